"""What single neurons of an MLP hold, what they write, and what a model loses without them."""

from methods_multimodal.neurons.ablation import NeuronAblation, ablate_neurons
from methods_multimodal.neurons.attribution import NeuronAttribution, attribute_neurons
from methods_multimodal.neurons.probability_change import ProbabilityChange, probability_change
from methods_multimodal.neurons.specific import NeuronActivity, neuron_activity
from methods_multimodal.neurons.vocabulary import NeuronTokens, project_neurons

__all__ = [
    "NeuronAblation",
    "NeuronActivity",
    "NeuronAttribution",
    "NeuronTokens",
    "ProbabilityChange",
    "ablate_neurons",
    "attribute_neurons",
    "neuron_activity",
    "probability_change",
    "project_neurons",
]
