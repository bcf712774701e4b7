"""What can be read off a model's values: probes, with their controls."""

from methods_multimodal.probing.classifiers import Probe, fit_probe
from methods_multimodal.probing.code_length import CodeLength, code_length
from methods_multimodal.probing.dimensions import IntrinsicProbe, find_dimensions
from methods_multimodal.probing.features import Features, Place, read_features
from methods_multimodal.probing.labels import Labels, Split, split_rows
from methods_multimodal.probing.modality_shares import ModalityShares, modality_shares, shapley
from methods_multimodal.probing.prompts import PromptProbe, prompt_probe
from methods_multimodal.probing.sheet import ProbeSheet
from methods_multimodal.probing.streamed import fit_streamed, predict_streamed
from methods_multimodal.probing.sweep import probe, probe_features

__all__ = [
    "CodeLength",
    "Features",
    "IntrinsicProbe",
    "Labels",
    "ModalityShares",
    "Place",
    "Probe",
    "ProbeSheet",
    "PromptProbe",
    "Split",
    "code_length",
    "find_dimensions",
    "fit_probe",
    "fit_streamed",
    "modality_shares",
    "predict_streamed",
    "probe",
    "probe_features",
    "prompt_probe",
    "read_features",
    "shapley",
    "split_rows",
]
