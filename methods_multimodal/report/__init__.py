"""One picture with numbers about one model and its input: the main job of `mm-interp report`."""

from methods_multimodal.report._page import Report
from methods_multimodal.report.contrastive import contrastive_report
from methods_multimodal.report.diffusion import diffusion_report
from methods_multimodal.report.vlm import vlm_report

__all__ = ["Report", "contrastive_report", "diffusion_report", "vlm_report"]
