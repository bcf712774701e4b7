"""Pictures of records: each takes a record, and takes and returns matplotlib Axes."""

from methods_multimodal.plots.attention import mosaic, overlay, tiles
from methods_multimodal.plots.attribution import head_shares, mlp_shares
from methods_multimodal.plots.circuits import circuit_map, faithfulness_lines
from methods_multimodal.plots.effects import effect_grid, effect_pairs
from methods_multimodal.plots.heads import group_bars, head_table, text_map
from methods_multimodal.plots.heatmap import heatmap
from methods_multimodal.plots.lens import lens_candidates, lens_maps, lens_sheet, lens_table
from methods_multimodal.plots.neurons import neuron_ablations
from methods_multimodal.plots.patching import patch_effects
from methods_multimodal.plots.picture import picture
from methods_multimodal.plots.probing import (
    answer_table,
    code_curve,
    dimension_curve,
    probe_curve,
    probe_sheet,
    probe_steps,
    token_shares,
)
from methods_multimodal.plots.tracing import flow_lines, head_importance_grid, trace_grid
from methods_multimodal.plots.word_maps import film_strip, word_change, word_map
from methods_multimodal.plots.words import word_lines

__all__ = [
    "answer_table",
    "circuit_map",
    "code_curve",
    "dimension_curve",
    "effect_grid",
    "effect_pairs",
    "faithfulness_lines",
    "film_strip",
    "flow_lines",
    "group_bars",
    "head_importance_grid",
    "head_shares",
    "head_table",
    "heatmap",
    "lens_candidates",
    "lens_maps",
    "lens_sheet",
    "lens_table",
    "mlp_shares",
    "mosaic",
    "neuron_ablations",
    "overlay",
    "patch_effects",
    "picture",
    "probe_curve",
    "probe_sheet",
    "probe_steps",
    "text_map",
    "tiles",
    "token_shares",
    "trace_grid",
    "word_change",
    "word_lines",
    "word_map",
]
