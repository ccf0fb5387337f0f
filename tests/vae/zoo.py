"""Every autoencoder class that diffusers exports, with a tiny configuration of it."""

from __future__ import annotations

from typing import Any

from tests.vae.case import Case

DOWN2 = ("DownEncoderBlock2D",) * 2
UP2 = ("UpDecoderBlock2D",) * 2
KL: dict[str, Any] = dict(
    block_out_channels=(8, 16), norm_num_groups=4, latent_channels=4, down_block_types=DOWN2, up_block_types=UP2,
    layers_per_block=1,
)  # fmt: skip
SQUARE = dict(tile_sample_min_size=16, tile_latent_min_size=8)
ON_STRIDES: dict[str, Any] = dict(
    tile_sample_min_height=16, tile_sample_min_width=16, tile_sample_stride_height=12, tile_sample_stride_width=12,
)  # fmt: skip
CACHED: dict[str, Any] = dict(
    base_dim=8, z_dim=4, dim_mult=[1, 2, 2], num_res_blocks=1, temperal_downsample=[False, True],
    latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
)  # fmt: skip
QUARTER = dict(scale_factor_spatial=4)
"""Of height and width, as two of three levels halve them."""
LARGE: dict[str, Any] = dict(
    tile_sample_min_height=48, tile_sample_min_width=48, tile_sample_stride_height=32, tile_sample_stride_width=32,
)  # fmt: skip

PICTURES = (
    Case(
        name="AutoencoderKL", config=KL, latents=(4, 16, 12), odd=(4, 13, 11), picture=(3, 32, 24),
        odd_picture=(3, 26, 22), tiles=SQUARE,
    ),
    Case(
        name="AutoencoderKL:plain",
        config=KL | dict(use_quant_conv=False, use_post_quant_conv=False, mid_block_add_attention=False),
        latents=(4, 16, 16), odd=(4, 13, 11), picture=(3, 32, 32), odd_picture=(3, 30, 22), tiles=SQUARE,
    ),
    Case(
        name="AutoencoderKLFlux2", config=KL, latents=(4, 16, 12), odd=(4, 13, 11), picture=(3, 32, 24),
        odd_picture=(3, 26, 22), tiles=SQUARE,
    ),
    Case(
        name="AsymmetricAutoencoderKL",
        config=dict(
            down_block_types=DOWN2, down_block_out_channels=(8, 16), up_block_types=UP2, up_block_out_channels=(8, 16),
            norm_num_groups=4, latent_channels=4,
        ),
        latents=(4, 16, 12), odd=(4, 13, 11), picture=(3, 32, 24), odd_picture=(3, 26, 22),
    ),
    Case(
        name="AutoencoderTiny",
        config=dict(
            encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4, num_encoder_blocks=(1,) * 4,
            num_decoder_blocks=(1,) * 4, latent_channels=4,
        ),
        latents=(4, 16, 12), odd=(4, 13, 11), picture=(3, 128, 96), odd_picture=(3, 104, 88),
        tiles=dict(tile_sample_min_size=64, tile_latent_min_size=8, tile_overlap_factor=0.25),
    ),
    Case(
        name="AutoencoderDC",
        config=dict(
            latent_channels=4, attention_head_dim=2, encoder_block_types=("ResBlock", "EfficientViTBlock"),
            decoder_block_types=("ResBlock", "EfficientViTBlock"), encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8), encoder_qkv_multiscales=((), (5,)),
            decoder_qkv_multiscales=((), (5,)), encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1),
            downsample_block_type="pixel_unshuffle", upsample_block_type="pixel_shuffle",
        ),
        latents=(4, 16, 12), odd=(4, 13, 11), picture=(3, 32, 24), odd_picture=(3, 26, 22),
        tiles=ON_STRIDES | dict(tile_latent_min_height=8, tile_latent_min_width=8),
    ),
    Case(
        name="AutoencoderDC:interpolated",
        config=dict(
            latent_channels=4, attention_head_dim=2, encoder_block_types="ResBlock", decoder_block_types="ResBlock",
            encoder_block_out_channels=(8, 8, 8), decoder_block_out_channels=(8, 8, 8),
            encoder_qkv_multiscales=((), (), ()), decoder_qkv_multiscales=((), (), ()),
            encoder_layers_per_block=(1, 1, 1), decoder_layers_per_block=(1, 1, 1), downsample_block_type="conv",
            upsample_block_type="interpolate", decoder_norm_types="rms_norm", decoder_act_fns="silu",
        ),
        latents=(4, 16, 12), odd=(4, 13, 11), picture=(3, 64, 48), odd_picture=(3, 52, 44),
    ),
    Case(
        name="AutoencoderKLHunyuanImage",
        config=dict(
            in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(32, 64), layers_per_block=1,
            spatial_compression_ratio=2, sample_size=16,
        ),
        latents=(4, 16, 12), odd=(4, 13, 11), picture=(3, 32, 24), odd_picture=(3, 26, 22), tiles=SQUARE,
    ),
    Case(
        name="AutoencoderKLKVAE",
        config=dict(channels=32, num_enc_blocks=1, num_dec_blocks=1, z_channels=4, ch_mult=(1, 2), sample_size=16),
        latents=(4, 16, 12), odd=(4, 13, 11), picture=(3, 32, 24), odd_picture=(3, 26, 22),
        tiles=dict(tile_sample_min_size=16, tile_latent_min_size=8),
    ),
    Case(
        name="AutoencoderRAE",
        config=dict(
            encoder_type="mae", encoder_hidden_size=64, encoder_patch_size=4, encoder_num_hidden_layers=1,
            decoder_hidden_size=16, decoder_num_hidden_layers=1, decoder_num_attention_heads=2,
            decoder_intermediate_size=32, patch_size=2, encoder_input_size=32,
        ),
        latents=(64, 8, 8), odd=(64, 8, 8), picture=(3, 32, 32), odd_picture=(3, 32, 32),
    ),
    Case(
        name="VQModel",
        config=KL | dict(latent_channels=3, num_vq_embeddings=16, norm_num_groups=4),
        latents=(3, 16, 12), odd=(3, 13, 11), picture=(3, 32, 24), odd_picture=(3, 26, 22),
    ),
    Case(
        name="VQModel:spatial",
        config=KL | dict(
            block_out_channels=(32, 32), latent_channels=3, num_vq_embeddings=16, norm_type="spatial",
            norm_num_groups=32,
        ),
        latents=(3, 16, 12), odd=(3, 13, 11), picture=(3, 32, 24), odd_picture=(3, 26, 22),
        source="VQModel of Kandinsky 2.2 (movq)",
    ),
    Case(
        name="ConsistencyDecoderVAE",
        config=dict(
            encoder_block_out_channels=(8, 16), encoder_down_block_types=DOWN2, encoder_layers_per_block=1,
            encoder_norm_num_groups=4, decoder_block_out_channels=(16, 16), decoder_layers_per_block=1,
            decoder_norm_num_groups=4, decoder_down_block_types=("ResnetDownsampleBlock2D",) * 2,
            decoder_up_block_types=("ResnetUpsampleBlock2D",) * 2, decoder_num_train_timesteps=1024,
            latent_channels=4,
        ),
        latents=(4, 8, 6), odd=(4, 7, 5), picture=(3, 32, 24), odd_picture=(3, 26, 22), draws=True, tiles=SQUARE,
    ),
)  # fmt: skip

VIDEOS = (
    Case(
        name="AutoencoderKLTemporalDecoder",
        config=dict(block_out_channels=(32, 64), down_block_types=DOWN2, latent_channels=4, layers_per_block=1),
        latents=(4, 16, 12), odd=(4, 13, 11), picture=(3, 32, 24), odd_picture=(3, 26, 22), frames=True,
    ),
    Case(
        name="AutoencoderKLWan", config=CACHED | QUARTER, latents=(4, 3, 16, 12), odd=(4, 2, 13, 11),
        picture=(3, 5, 64, 48), odd_picture=(3, 3, 52, 44), tiles=ON_STRIDES,
    ),
    Case(
        name="AutoencoderKLWan:residual",
        config=CACHED | dict(is_residual=True, patch_size=2, in_channels=12, out_channels=12, dim_mult=[1, 1, 2, 2],
                             temperal_downsample=[False, True, True], scale_factor_spatial=16),
        latents=(4, 2, 8, 6), odd=(4, 2, 7, 5), picture=(3, 5, 128, 96), odd_picture=(3, 5, 112, 80),
        tiles=dict(tile_sample_min_height=64, tile_sample_min_width=64, tile_sample_stride_height=48,
                   tile_sample_stride_width=48),
        source="Wan 2.2 5B",
    ),
    Case(
        name="AutoencoderKLQwenImage", config=CACHED, latents=(4, 1, 16, 12), odd=(4, 2, 13, 11),
        picture=(3, 1, 64, 48), odd_picture=(3, 3, 52, 44), tiles=ON_STRIDES,
    ),
    Case(
        name="AutoencoderKLQwenImage21",
        config=CACHED | QUARTER | dict(decoder_base_dim=8),
        latents=(4, 1, 16, 12), odd=(4, 1, 13, 11), picture=(4, 1, 64, 48), odd_picture=(4, 1, 52, 44),
        tiles=ON_STRIDES,
    ),
    Case(
        name="AutoencoderKLHunyuanVideo",
        config=dict(
            latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4,
            spatial_compression_ratio=8, temporal_compression_ratio=4, mid_block_add_attention=True,
        ),
        latents=(4, 3, 8, 6), odd=(4, 2, 7, 5), picture=(3, 9, 64, 48), odd_picture=(3, 5, 56, 40),
        tiles=dict(
            tile_sample_min_height=32, tile_sample_min_width=32, tile_sample_stride_height=24,
            tile_sample_stride_width=24, tile_sample_min_num_frames=8, tile_sample_stride_num_frames=4,
        ),
    ),
    Case(
        name="AutoencoderKLHunyuanVideo15",
        config=dict(
            latent_channels=4, block_out_channels=(16, 16), layers_per_block=1, spatial_compression_ratio=4,
            temporal_compression_ratio=2, downsample_match_channel=False, upsample_match_channel=False,
        ),
        latents=(4, 3, 12, 8), odd=(4, 2, 11, 7), picture=(3, 5, 48, 32), odd_picture=(3, 3, 44, 28), sliced=True,
        tiles=dict(
            tile_sample_min_height=32, tile_sample_min_width=32, tile_latent_min_height=8, tile_latent_min_width=8,
        ),
    ),
    Case(
        name="AutoencoderKLHunyuanImageRefiner",
        config=dict(
            latent_channels=4, block_out_channels=(16, 16), layers_per_block=1, spatial_compression_ratio=4,
            temporal_compression_ratio=2, downsample_match_channel=False, upsample_match_channel=False,
        ),
        latents=(4, 3, 12, 8), odd=(4, 2, 11, 7), picture=(3, 5, 48, 32), odd_picture=(3, 3, 44, 28), tiles=ON_STRIDES,
    ),
    Case(
        name="AutoencoderKLCogVideoX",
        config=dict(
            block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=2,
            temporal_compression_ratio=4, sample_height=96, sample_width=80,
        ),
        latents=(4, 3, 12, 8), odd=(4, 2, 13, 7), picture=(3, 9, 96, 64), odd_picture=(3, 5, 104, 56), tiles={},
    ),
    Case(
        name="AutoencoderKLLTXVideo",
        config=dict(
            latent_channels=8, block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8, 8, 8, 8),
            layers_per_block=(1, 1, 1, 1, 1), decoder_layers_per_block=(1, 1, 1, 1, 1),
            spatio_temporal_scaling=(True, True, False, False),
            decoder_spatio_temporal_scaling=(True, True, False, False),
            decoder_inject_noise=(False,) * 5, upsample_residual=(False,) * 4, upsample_factor=(1,) * 4,
            timestep_conditioning=False, patch_size=1, patch_size_t=1, encoder_causal=True, decoder_causal=False,
        ),
        latents=(8, 3, 12, 8), odd=(8, 2, 11, 7), picture=(3, 9, 48, 32), odd_picture=(3, 5, 44, 28),
        tiles=ON_STRIDES,
    ),
)  # fmt: skip

VIDEOS2 = (
    Case(
        name="AutoencoderKLLTX2Video",
        config=dict(
            latent_channels=8, block_out_channels=(8, 16), decoder_block_out_channels=(8, 16),
            layers_per_block=(1, 1, 1), decoder_layers_per_block=(1, 1, 1), spatio_temporal_scaling=(True, True),
            decoder_spatio_temporal_scaling=(True, True), decoder_inject_noise=(False,) * 3,
            downsample_type=("spatial", "spatiotemporal"), upsample_type=("spatiotemporal", "spatial"),
            upsample_residual=(True, True), upsample_factor=(2, 2), timestep_conditioning=False, patch_size=2,
            patch_size_t=1,
        ),
        latents=(8, 3, 12, 8), odd=(8, 2, 11, 7), picture=(3, 5, 96, 64), odd_picture=(3, 3, 88, 56),
        tiles=LARGE,
    ),
    Case(
        name="AutoencoderKLMochi",
        config=dict(
            in_channels=15, out_channels=3, latent_channels=4, encoder_block_out_channels=(32, 32, 32, 32),
            decoder_block_out_channels=(32, 32, 32, 32), layers_per_block=(1, 1, 1, 1, 1),
            temporal_expansions=(1, 2, 3), spatial_expansions=(2, 2, 2),
            add_attention_block=(False, True, True, True, True), latents_mean=None, latents_std=None,
        ),
        latents=(4, 2, 12, 8), odd=(4, 2, 11, 7), picture=(3, 7, 96, 64), odd_picture=(3, 7, 88, 56), tiles=LARGE,
    ),
    Case(
        name="AutoencoderKLCosmos",
        config=dict(
            latent_channels=4, encoder_block_out_channels=(8, 8, 8, 8), decode_block_out_channels=(8, 8, 8, 8),
            attention_resolutions=(8,), resolution=64, num_layers=1, patch_size=4, spatial_compression_ratio=4,
            temporal_compression_ratio=4, latents_mean=None, latents_std=None,
        ),
        latents=(4, 2, 8, 6), odd=(4, 2, 7, 5), picture=(3, 5, 64, 48), odd_picture=(3, 5, 56, 40),
    ),
    Case(
        name="AutoencoderKLAllegro",
        config=dict(
            latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=2,
            temporal_compression_ratio=4, sample_size=32,
        ),
        latents=(4, 6, 7, 4), odd=(4, 6, 10, 4), picture=(3, 24, 56, 32), odd_picture=(3, 24, 80, 32),
        always_tiled=True, sliced=True,
        tiles=dict(tile_overlap_h=8, tile_overlap_w=8, stride=(16, 24, 24)),
    ),
    Case(
        name="AutoencoderKLMagvit",
        config=dict(
            block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=2,
            spatial_group_norm=True,
            down_block_types=["SpatialDownBlock3D"] + ["SpatialTemporalDownBlock3D"] * 3,
            up_block_types=["SpatialUpBlock3D"] + ["SpatialTemporalUpBlock3D"] * 3,
        ),
        latents=(4, 2, 12, 8), odd=(4, 2, 11, 7), picture=(3, 5, 96, 64), odd_picture=(3, 5, 88, 56), tiles=LARGE,
    ),
    Case(
        name="AutoencoderKLKVAEVideo",
        config=dict(ch=32, ch_mult=(1, 2), num_res_blocks=1, z_channels=4, temporal_compress_times=2),
        latents=(4, 3, 12, 8), odd=(4, 2, 11, 7), picture=(3, 5, 24, 16), odd_picture=(3, 5, 22, 14),
    ),
    Case(
        name="AutoencoderKLMiniMaxH3",
        config=dict(
            latent_channels=4, block_out_channels=(8, 8, 16), layers_per_block=1, norm_num_groups=4,
            spatial_downsample_factors=(2, 2, 1), temporal_downsample_factors=(2, 2, 1), decoder_num_layers=2,
            decoder_num_attention_heads=2, decoder_attention_head_dim=24, decoder_num_register_tokens=2,
            decoder_ffn_mult=2, latents_mean=(0.0,) * 4, latents_std=(1.0,) * 4,
        ),
        latents=(4, 7, 12, 8), odd=(4, 7, 11, 7), picture=(3, 17, 48, 32), odd_picture=(3, 17, 44, 28),
        tiles=dict(
            tile_sample_min_height=32, tile_sample_min_width=24, tile_sample_min_overlap_height=8,
            tile_sample_min_overlap_width=8,
        ),
    ),
    Case(
        name="AutoencoderVidTok",
        config=dict(ch=32, ch_mult=[1, 2, 2], num_res_blocks=1, z_channels=4),
        latents=(4, 2, 12, 8), odd=(4, 2, 11, 7), picture=(3, 17, 48, 32), odd_picture=(3, 17, 44, 28),
        tiles=dict(
            tile_sample_min_height=16, tile_sample_min_width=16, tile_latent_min_height=4, tile_latent_min_width=4,
        ),
    ),
    Case(
        name="Kandinsky6SRVAE",
        config=dict(
            latent_channels=4, encoder_block_out_channels=(32, 32, 32), decoder_block_out_channels=(32, 32, 32),
            layers_per_block=1, temporal_compression_ratio=4, temporal_compression_start_level=0,
        ),
        latents=(4, 2, 12, 8), odd=(4, 2, 11, 7), picture=(3, 5, 48, 32), odd_picture=(3, 5, 44, 28),
    ),
    Case(
        name="LTX2VideoDiffusionDecoderModel",
        config=dict(
            latent_channels=4, patch_size=4, decoder_head_dim=8, decoder_stage_channels=(32, 16, 8, 8, 8),
            decoder_stage_depths=(1, 1, 1, 1, 1), decoder_stage_kernels=((3, 3, 3),) * 4,
            decoder_upsample_strides=((1, 2, 2), (1, 1, 1), (1, 1, 1), (2, 1, 1)),
            decoder_upsample_channel_reductions=(2, 2, 1, 1), decoder_stage5_kernel=(3, 3, 3), decoder_t_emb_dim=8,
            spatial_compression_ratio=8, temporal_compression_ratio=2,
        ),
        latents=(4, 2, 6, 4), odd=(4, 2, 5, 4), draws=True,
        tiles=dict(
            tile_sample_min_height=32, tile_sample_min_width=32, tile_sample_stride_height=24,
            tile_sample_stride_width=24, tile_sample_min_num_frames=8, tile_sample_stride_num_frames=6,
        ),
    ),
)  # fmt: skip

SOUNDS = (
    Case(
        name="AutoencoderOobleck",
        config=dict(
            encoder_hidden_size=8, downsampling_ratios=[2, 4], channel_multiples=[1, 2], decoder_channels=8,
            decoder_input_channels=4, audio_channels=2, sampling_rate=80,
        ),
        latents=(4, 32), odd=(4, 29), picture=(2, 256), odd_picture=(2, 232), dim=-1,
        tiles=dict(
            tile_sample_min_length=96, tile_sample_overlap=16, tile_latent_min_length=12, tile_latent_overlap=2,
        ),
    ),
    Case(
        name="AutoencoderKLKVAEAudio",
        config=dict(
            encoder_dim=4, encoder_rates=[2, 3], latent_dim=16, codebook_dim=4, decoder_dim=16, decoder_rates=[3, 2],
            attn_num_heads=2,
        ),
        latents=(4, 32), odd=(4, 29), picture=(1, 192), odd_picture=(1, 174), dim=-1,
    ),
    Case(
        name="AutoencoderKLLTX2Audio",
        config=dict(
            base_channels=8, output_channels=2, ch_mult=(1, 2, 2), num_res_blocks=1, in_channels=2, resolution=32,
            latent_channels=4, mel_bins=8, mid_block_add_attention=True,
        ),
        latents=(4, 16, 2), odd=(4, 13, 2), picture=(2, 61, 8), odd_picture=(2, 49, 8),
    ),
    Case(
        name="AutoencoderKLMiniMaxH3Audio",
        config=dict(
            encoder_dim=4, encoder_rates=(2, 4), latent_dim=16, latent_channels=4, num_attention_heads=2,
            decoder_dim=16, decoder_rates=(4, 2), decoder_kernel_sizes=(8, 4), resblock_kernel_sizes=(3, 7),
            resblock_dilation_sizes=((1, 3), (1, 3)),
        ),
        latents=(4, 32), odd=(4, 29), picture=(1, 256), odd_picture=(1, 232), dim=-1,
    ),
    Case(
        name="AutoencoderSAME",
        config=dict(
            patch_size=4, encoder_channels=8, encoder_c_mults=[2], encoder_strides=[4], encoder_transformer_depths=[2],
            latent_dim=8, dim_heads=8, ff_mult=2,
        ),
        latents=(8, 32), odd=(8, 29), picture=(2, 512), odd_picture=(2, 464), dim=-1,
    ),
    Case(
        name="Cosmos3AVAEAudioTokenizer",
        config=dict(
            vocoder_input_dim=4, dec_dim=4, dec_c_mults=(1, 2), dec_strides=(2, 4), enc_dim=8, enc_num_blocks=1,
            enc_n_fft=8, enc_hop_length=2, enc_latent_dim=8, enc_c_mults=(1, 2), enc_strides=(2, 2),
        ),
        latents=(4, 32), odd=(4, 29), picture=(2, 256), odd_picture=(2, 232), dim=-1,
    ),
    Case(
        name="LongCatAudioDiTVae",
        config=dict(
            in_channels=1, channels=8, c_mults=[1, 2], strides=[2, 4], latent_dim=4, encoder_latent_dim=8,
            downsampling_ratio=8,
        ),
        latents=(4, 32), odd=(4, 29), picture=(1, 256), odd_picture=(1, 232), dim=-1,
        encode=dict(sample_posterior=False),
    ),
    Case(
        name="MMAudioVAE",
        config=dict(
            mel_bins=8, latent_channels=4, hidden_channels=8, channel_multipliers=(1, 2), layers_per_block=1,
            sample_rate=800, n_fft=32, hop_length=8,
        ),
        latents=(4, 32), odd=(4, 29), picture=(512,), odd_picture=(464,), dim=-1,
    ),
)  # fmt: skip

OTHERS = (
    Case(
        name="MMAudioVocoder",
        unbuilt="no `decode` and no `encode`: the vocoder is called itself, on the mel spectrogram of MMAudioVAE",
    ),
    Case(
        name="MiniMaxMusic3Vocoder",
        unbuilt="no `decode` and no `encode`: the vocoder is called itself, on latents",
    ),
    Case(
        name="RFD4ProteinaAutoencoder",
        unbuilt="no picture, video or sound: atoms of proteins, described by tables of residues beside them, "
        "in tokens of which each attends to all",
    ),
)

CASES = (*PICTURES, *VIDEOS, *VIDEOS2, *SOUNDS, *OTHERS)
