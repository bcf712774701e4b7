"""Which training examples made a model do what it does."""

from methods_multimodal.data_attribution.contrastive import contrastive_task
from methods_multimodal.data_attribution.diffusion import diffusion_task
from methods_multimodal.data_attribution.encoding import diffusion_examples
from methods_multimodal.data_attribution.task import Task, module_task

__all__ = ["Task", "contrastive_task", "diffusion_examples", "diffusion_task", "module_task"]
