"""Autoencoders beside AutoencoderKL, from the latent to the picture."""

from mm_adapters.records import Input, Output, Tower, register

register(
    Tower(
        "autoencoder",
        "vae",
        ("diffusers:AutoencoderDC", "diffusers:VQModel"),
        {},
        before={"hook_latent": Input("decoder", is_map=True)},
        after={"hook_out": Output("decoder", is_map=True)},
        norm=None,
        takes="sample",
        gives="sample",
        pool="none",
        calls="decoder",
    )
)
register(
    Tower(
        "autoencoder_of_frames",
        "vae",
        ("diffusers:AutoencoderKLQwenImage",),
        {},
        # A picture is a film of one frame.
        before={"hook_latent": Input("decoder", axes=("batch", "channel", "frame", "height", "width"))},
        after={"hook_out": Output("decoder", axes=("batch", "channel", "frame", "height", "width"))},
        norm=None,
        takes="sample",
        gives="sample",
        pool="none",
        calls="decoder",
    )
)
