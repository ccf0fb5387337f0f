"""Cosmos 1, 2, 2.5 and 3."""

from __future__ import annotations

import torch

from tests.models import Inputs, Sizes
from tests.zoo.case import Case
from tests.zoo.inputs import legible, video


def inputs(sizes: Sizes) -> Inputs:
    return dict(
        hidden_states=video(sizes, 4, 2),
        timestep=torch.randint(0, 1000, (sizes.batch,)),
        encoder_hidden_states=torch.randn(sizes.batch, sizes.text, 16),
        attention_mask=legible(sizes),
        fps=30,
    )


def video_inputs(sizes: Sizes) -> Inputs:
    """The first frame is given: it has a timestep and a mask of its own."""
    frames, rows, columns = sizes.grid
    given = (torch.arange(frames) == 0).float().view(1, 1, -1, 1, 1).expand(sizes.batch, -1, -1, -1, -1)
    timestep = given * 0.1 + (1 - given) * torch.rand(sizes.batch, 1, 1, 1, 1)
    mask = given.expand(-1, -1, -1, 2 * rows, 2 * columns)
    return inputs(sizes) | dict(timestep=timestep, condition_mask=mask)


def transfer_inputs(sizes: Sizes) -> Inputs:
    """Residuals after the first and the third block; text and image embeddings in a tuple, without a mask."""
    values = video_inputs(sizes) | dict(
        encoder_hidden_states=(torch.randn(sizes.batch, sizes.text, 20), torch.randn(sizes.batch, 5, 12)),
        block_controlnet_hidden_states=[torch.randn(sizes.batch, sizes.image, 36) for _ in range(2)],
    )
    del values["attention_mask"], values["fps"]
    return values


def omni_inputs(sizes: Sizes) -> Inputs:
    """One sequence without a batch dim: text first, then the video's patches."""
    frames, rows, columns = sizes.grid
    text, end = sizes.text, sizes.text + sizes.image
    grid = torch.cartesian_prod(torch.arange(frames) + text + 7, torch.arange(rows), torch.arange(columns))
    return dict(
        input_ids=torch.randint(0, 32, (text,)),
        text_indexes=torch.arange(text),
        position_ids=torch.cat([torch.arange(text).expand(3, -1), grid.T], dim=1),
        und_len=text,
        sequence_length=end,
        vision_tokens=[torch.randn(1, 4, frames, 2 * rows, 2 * columns)],
        vision_token_shapes=[sizes.grid],
        vision_sequence_indexes=torch.arange(text, end),
        vision_mse_loss_indexes=torch.arange(text, end),
        vision_timesteps=torch.full((sizes.image,), 700.0),
        vision_noisy_frame_indexes=[torch.arange(frames)],
    )


def omni_sound_inputs(sizes: Sizes) -> Inputs:
    """The first of several frames is given, so fewer patches come out than go in; then follow a sound's 3 tokens and
    an action's 2."""
    frames, rows, columns = sizes.grid
    values = omni_inputs(sizes)
    text, end, given = sizes.text, sizes.text + sizes.image, int(frames > 1)
    sound, action = torch.arange(end, end + 3), torch.arange(end + 3, end + 5)
    times = torch.tensor([0, 1, 2, 0, 1])
    later = torch.stack([times + text + 7, torch.zeros(5, dtype=torch.int64), torch.zeros(5, dtype=torch.int64)])
    return values | dict(
        position_ids=torch.cat([values["position_ids"], later], dim=1),
        sequence_length=end + 5,
        vision_mse_loss_indexes=torch.arange(text + given * rows * columns, end),
        vision_timesteps=torch.full(((frames - given) * rows * columns,), 700.0),
        vision_noisy_frame_indexes=[torch.arange(given, frames)],
        sound_tokens=[torch.randn(6, 3)],
        sound_token_shapes=[(3, 1, 1)],
        sound_sequence_indexes=sound,
        sound_mse_loss_indexes=sound,
        sound_timesteps=torch.full((3,), 700.0),
        sound_noisy_frame_indexes=[torch.arange(3)],
        action_tokens=[torch.randn(2, 5)],
        action_token_shapes=[(2, 1, 1)],
        action_sequence_indexes=action,
        action_mse_loss_indexes=action,
        action_timesteps=torch.full((2,), 700.0),
        action_noisy_frame_indexes=[torch.arange(2)],
        action_domain_ids=[torch.tensor(1)],
    )


# Every pipeline sets `concat_padding_mask`, but that resizes the mask with torchvision, which is not installed here;
# it only adds a channel before the patches.
COSMOS = dict(
    in_channels=4, out_channels=4, num_attention_heads=3, attention_head_dim=12, num_layers=2, mlp_ratio=2,
    text_embed_dim=16, adaln_lora_dim=4, max_size=(16, 64, 64), patch_size=(1, 2, 2), rope_scale=(2.0, 1.0, 1.0),
    concat_padding_mask=False, extra_pos_embed_type="learnable",
)  # fmt: skip
TRANSFER = dict(
    in_channels=5, num_layers=3, extra_pos_embed_type=None, use_crossattn_projection=True,
    crossattn_proj_in_channels=20, encoder_hidden_states_channels=16, controlnet_block_every_n=2,
    img_context_dim_in=12, img_context_num_tokens=5, img_context_dim_out=36,
)  # fmt: skip
OMNI = dict(
    head_dim=12, hidden_size=48, intermediate_size=64, latent_channel=4, latent_patch_size=2, patch_latent_dim=16,
    num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2, rope_axes_dim=[2, 2, 2], vocab_size=32,
)  # fmt: skip
SOUND = dict(
    hidden_act="relu2", qk_norm_for_text=False, use_und_k_norm_for_gen=True, sound_gen=True, sound_dim=6,
    action_gen=True, action_dim=5, num_embodiment_domains=3,
)  # fmt: skip
VIDEO_SIZES = Sizes(grid=(3, 3, 5))
ONE_VIDEO = Sizes(grid=(3, 3, 5), batch=1)

CASES = (
    Case(
        name="CosmosTransformer3DModel",
        config=COSMOS,
        inputs=inputs,
        source="diffusers, tests/models/transformers/test_models_transformer_cosmos.py; 3 heads instead of 2",
    ),
    Case(
        name="CosmosTransformer3DModel: video to world",
        config=COSMOS | dict(in_channels=5),
        inputs=video_inputs,
        sizes=VIDEO_SIZES,  # a timestep per frame says something only with several frames
        source="diffusers, tests/models/transformers/test_models_transformer_cosmos.py; timesteps as Cosmos 2",
    ),
    Case(
        name="CosmosTransformer3DModel: control residuals",
        config=COSMOS | TRANSFER,
        inputs=transfer_inputs,
        sizes=VIDEO_SIZES,
        source="nvidia/Cosmos-Transfer2.5-2B scaled down; pipelines/cosmos/pipeline_cosmos2_5_transfer.py",
    ),
    Case(
        name="Cosmos3OmniTransformer",
        config=OMNI,
        inputs=omni_inputs,
        sizes=ONE_VIDEO,  # there is no batch
        source="diffusers, tests/models/transformers/test_models_transformer_cosmos3.py; 4 heads, 2 of keys",
    ),
    Case(
        name="Cosmos3OmniTransformer: sound and action",
        config=OMNI | SOUND,
        inputs=omni_sound_inputs,
        sizes=ONE_VIDEO,
        source="diffusers, tests/models/transformers/test_models_transformer_cosmos3.py; as Edge, and sound",
    ),
)
