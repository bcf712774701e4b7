"""One picture with numbers about one model and its input: the main job of `mm-interp report`."""

from methods_multimodal.report._page import Report
from methods_multimodal.report.contrastive import contrastive_report
from methods_multimodal.report.diffusion import diffusion_report
from methods_multimodal.report.trace import trace_report
from methods_multimodal.report.vlm import vlm_report
from methods_multimodal.report.words import words_report

__all__ = [
    "Report",
    "contrastive_report",
    "diffusion_report",
    "trace_report",
    "vlm_report",
    "words_report",
]
