"""Pictures of records: each takes a record, and takes and returns matplotlib Axes."""

from methods_multimodal.plots.attention import mosaic, overlay, tiles
from methods_multimodal.plots.attribution import head_shares, mlp_shares
from methods_multimodal.plots.circuits import circuit_map, faithfulness_lines
from methods_multimodal.plots.effects import effect_grid, effect_pairs
from methods_multimodal.plots.heads import group_bars, head_table, text_map
from methods_multimodal.plots.heatmap import heatmap
from methods_multimodal.plots.lens import lens_table
from methods_multimodal.plots.patching import patch_effects
from methods_multimodal.plots.picture import picture
from methods_multimodal.plots.word_maps import film_strip, word_change, word_map
from methods_multimodal.plots.words import word_lines

__all__ = [
    "circuit_map",
    "effect_grid",
    "effect_pairs",
    "faithfulness_lines",
    "film_strip",
    "group_bars",
    "head_shares",
    "head_table",
    "heatmap",
    "lens_table",
    "mlp_shares",
    "mosaic",
    "overlay",
    "patch_effects",
    "picture",
    "text_map",
    "tiles",
    "word_change",
    "word_lines",
    "word_map",
]
