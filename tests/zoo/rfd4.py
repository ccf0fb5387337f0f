"""RFD4-Proteina: proteins, one token per residue, and a representation of all pairs of tokens."""

from __future__ import annotations

import torch

from tests.models import Inputs, Sizes
from tests.zoo.case import Case


def rfd4_inputs(sizes: Sizes) -> Inputs:
    """Two passes through all blocks. The last sample is a third shorter; there is no text."""
    batch, tokens = sizes.batch, sizes.image
    present = torch.ones(batch, tokens, dtype=torch.bool)
    present[-1, tokens - tokens // 3 :] = False
    place = torch.arange(tokens)
    molecule = (place >= tokens // 2).long().repeat(batch, 1)
    return dict(
        bb_ca=torch.randn(batch, tokens, 3),
        local_latents=torch.randn(batch, tokens, 8),
        bb_ca_time=torch.rand(batch),
        local_latents_time=torch.rand(batch),
        padding_mask=present,
        token_type=torch.randint(0, 3, (batch, tokens)),
        atom37_mask=torch.rand(batch, tokens, 37) < 0.5,
        conditioning={
            "is_in_context_conditioning": torch.zeros(batch, tokens, dtype=torch.bool),
            "supports_local_latent": torch.ones(batch, tokens, dtype=torch.bool),
            "condition_rasa-binned_1_atom": torch.rand(batch, tokens, 37),
            "molecule_iid": molecule,
            "token_bond_path_length": (place[:, None] - place).abs().repeat(batch, 1, 1),
        },
        recycle_depth=2,
    )


CASES = (
    Case(
        name="RFD4ProteinaTransformer",
        config=dict(
            nlayers=3, token_dim=48, nheads=3, dim_cond=16, pair_repr_dim=12, latent_dim=8, token_type_emb_dim=8,
            cath_emb_dim=4, t_emb_dim=16, seq_sep_dim=16, xt_pair_dist_dim=10, tri_mult_c=8, num_sequence_classes=20,
            recycle_conditioning_dim=2, feats_seq=("xt_bb_ca", "xt_local_latents", "token_type", "rasa_binned"),
            feats_cond_seq=("time_emb_bb_ca", "time_emb_local_latents", "recycle_remaining"),
            feats_pair_repr=("xt_bb_ca_pair_dists", "molecule_idx_pair", "token_bond_path_length"),
        ),
        inputs=rfd4_inputs,
        source="docstring of diffusers.RFD4ProteinaTransformer; its defaults scaled down, some of its features",
    ),
)  # fmt: skip
