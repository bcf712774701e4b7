"""Circuits: which nodes and edges of a model carry the difference between two inputs, across towers."""

from methods_multimodal.circuits.node_scores import NodeScores, score_nodes
from methods_multimodal.circuits.nodes import Node, circuit_nodes, select_nodes
from methods_multimodal.circuits.pairs import Pairs

__all__ = ["Node", "NodeScores", "Pairs", "circuit_nodes", "score_nodes", "select_nodes"]
