"""Circuits: which nodes and edges of a model carry the difference between two inputs, across towers."""

from methods_multimodal.circuits.checks import CircuitCheck, baseline_orders, check_circuit
from methods_multimodal.circuits.edge_scores import EdgeScores, score_edges
from methods_multimodal.circuits.faithfulness import FaithfulnessCurve, faithfulness_curve
from methods_multimodal.circuits.mib_json import read_mib, write_mib
from methods_multimodal.circuits.node_scores import NodeScores, score_nodes
from methods_multimodal.circuits.nodes import Node, circuit_nodes, select_nodes
from methods_multimodal.circuits.pairs import Pairs

__all__ = [
    "CircuitCheck",
    "EdgeScores",
    "FaithfulnessCurve",
    "Node",
    "NodeScores",
    "Pairs",
    "baseline_orders",
    "check_circuit",
    "circuit_nodes",
    "faithfulness_curve",
    "read_mib",
    "score_edges",
    "score_nodes",
    "select_nodes",
    "write_mib",
]
