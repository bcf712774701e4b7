"""What can be read off a model's values: probes, with their controls."""

from methods_multimodal.probing.classifiers import Probe, fit_probe
from methods_multimodal.probing.code_length import CodeLength, code_length
from methods_multimodal.probing.dimensions import IntrinsicProbe, find_dimensions
from methods_multimodal.probing.features import Features, Place, read_features
from methods_multimodal.probing.labels import Labels, Split, split_rows
from methods_multimodal.probing.sweep import probe, probe_features
from methods_multimodal.probing.sheet import ProbeSheet

__all__ = [
    "CodeLength",
    "Features",
    "IntrinsicProbe",
    "Labels",
    "Place",
    "Probe",
    "ProbeSheet",
    "Split",
    "code_length",
    "find_dimensions",
    "fit_probe",
    "probe",
    "probe_features",
    "read_features",
    "split_rows",
]
