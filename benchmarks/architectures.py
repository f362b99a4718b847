"""Small random models of many architectures, to try the conversion on; none is known to effkern.

Each entry builds a model and its inputs; where its package is missing that raises ImportError.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

IDS = torch.arange(14).view(2, 7) * 5 % 90 + 5
IMAGE = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
WAVE = torch.randn(2, 800, generator=torch.Generator().manual_seed(0))

SPECIAL = {"vocab_size": 99, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
TEXT = {
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "max_position_embeddings": 32,
}
GPT = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 20}
VISION = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}
PAIR = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "decoder_start_token_id": 1,
}
AUDIO = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "conv_dim": [16, 16],
    "conv_stride": [5, 4],
    "conv_kernel": [10, 8],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "vocab_size": 40,
}
STABLE = AUDIO | {"do_stable_layer_norm": True, "feat_extract_norm": "layer"}

MIXER = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "num_blocks": 2}
#: A vision transformer of vit-pytorch.
VIT_PYTORCH = {
    "image_size": 32,
    "patch_size": 8,
    "num_classes": 10,
    "dim": 32,
    "depth": 2,
    "heads": 2,
    "mlp_dim": 64,
}

Built = tuple[torch.nn.Module, Any]


def hf(model: str, config: str, inputs: dict[str, Any], **settings: Any) -> Callable[[], Built]:
    """A model of transformers, by the names of its class and its config's."""

    def build() -> Built:
        import transformers

        transformers.utils.logging.set_verbosity_error()
        torch.manual_seed(0)
        made = getattr(transformers, model)(getattr(transformers, config)(**settings))
        return made, inputs

    return build


def tm(name: str, **settings: Any) -> Callable[[], Built]:
    """A model of timm."""

    def build() -> Built:
        import timm

        torch.manual_seed(0)
        small = {"img_size": 32, "embed_dim": 48, "depth": 2, "num_heads": 2} | settings
        return timm.create_model(name, **small), (IMAGE,)

    return build


def of_class(path: str, inputs: Any, **settings: Any) -> Callable[[], Built]:
    """A model by the full name of its class."""

    def build() -> Built:
        module, _, name = path.rpartition(".")
        made = getattr(importlib.import_module(module), name)
        torch.manual_seed(0)
        return made(**settings), inputs

    return build


def gmixer() -> Built:
    """The gMixer of timm: a mixer with gates."""
    from timm.layers import GluMlp

    return of_class(
        "timm.models.MlpMixer", (IMAGE,), mlp_ratio=(1.0, 4.0), mlp_layer=GluMlp, **MIXER
    )()


def gmlp() -> Built:
    """The gMLP of timm."""
    from timm.layers import GatedMlp
    from timm.models.mlp_mixer import SpatialGatingBlock

    return of_class(
        "timm.models.MlpMixer",
        (IMAGE,),
        mlp_ratio=6,
        block_layer=SpatialGatingBlock,
        mlp_layer=GatedMlp,
        **MIXER,
    )()


def mvit() -> Built:
    """MViT v2 of torchvision, with pooled residuals."""
    from torchvision.models.video import MViT
    from torchvision.models.video.mvit import MSBlockConfig

    kernel = [3, 3, 3]
    blocks = [
        MSBlockConfig(1, 16, 16, kernel, kernel, [1, 1, 1], [1, 2, 2]),
        MSBlockConfig(2, 16, 32, kernel, kernel, [1, 2, 2], [1, 2, 2]),
    ]
    model = MViT(
        (32, 32),
        4,
        blocks,
        residual_pool=True,
        residual_with_cls_embed=False,
        rel_pos_embed=True,
        proj_after_attn=True,
    )
    return model, (torch.randn(1, 3, 4, 32, 32),)


def tv(name: str) -> Callable[[], Built]:
    """A model of torchvision."""

    def build() -> Built:
        from torchvision import models

        def conv_stem() -> list[Any]:
            return [models.vision_transformer.ConvStemConfig(16, 3, 4)] * 2

        small = {
            "vit": lambda: models.VisionTransformer(32, 16, 2, 2, 48, 96),
            "vit, stem": lambda: models.VisionTransformer(
                32, 16, 2, 2, 48, 96, conv_stem_configs=conv_stem()
            ),
            "swin": lambda: models.SwinTransformer([4, 4], 16, [1, 1], [2, 2], [4, 4]),
            "maxvit": lambda: models.MaxVit((32, 32), 16, 2, [16, 16], [1, 1], 8, 0.0),
        }
        return small[name](), (IMAGE,)

    return build


def encoder(final: bool = True) -> Callable[[], Built]:
    """nn.TransformerEncoder, Pre-LN, with or without a norm after the last layer."""

    def build() -> Built:
        layer = torch.nn.TransformerEncoderLayer(32, 2, 64, batch_first=True, norm_first=True)
        norm = torch.nn.LayerNorm(32) if final else None
        model = torch.nn.TransformerEncoder(layer, 2, norm=norm, enable_nested_tensor=False)
        return model, (torch.randn(2, 5, 32),)

    return build


def pair() -> Built:
    """nn.Transformer, Pre-LN, with a causal mask, which it looks at."""
    model = torch.nn.Transformer(32, 2, 1, 1, 64, batch_first=True, norm_first=True)
    mask = torch.nn.Transformer.generate_square_subsequent_mask(4)
    return model, {"src": torch.randn(2, 5, 32), "tgt": torch.randn(2, 4, 32), "tgt_mask": mask}


T, PX, WV = {"input_ids": IDS}, {"pixel_values": IMAGE}, {"input_values": WAVE}
TT = {"input_ids": IDS, "decoder_input_ids": IDS}
FRAMES = {"pixel_values": torch.randn(2, 4, 3, 32, 32)}
CLIP_TEXT = {k: v for k, v in TEXT.items() if k != "max_position_embeddings"} | {
    "vocab_size": 99,
    "max_position_embeddings": 7,
}

ARCHITECTURES: dict[str, Callable[[], Built]] = {
    "transformers GPT2": hf("GPT2LMHeadModel", "GPT2Config", T, **GPT, **SPECIAL),
    "transformers OPT": hf(
        "OPTForCausalLM", "OPTConfig", T, **TEXT, ffn_dim=64, word_embed_proj_dim=32, **SPECIAL
    ),
    "transformers BLOOM": hf(
        "BloomForCausalLM", "BloomConfig", T, n_layer=2, n_head=2, hidden_size=32, **SPECIAL
    ),
    "transformers GPTNeoX": hf("GPTNeoXForCausalLM", "GPTNeoXConfig", T, **TEXT, **SPECIAL),
    "transformers GPTJ": hf("GPTJForCausalLM", "GPTJConfig", T, rotary_dim=8, **GPT, **SPECIAL),
    "transformers ViT": hf("ViTModel", "ViTConfig", PX, **VISION),
    "transformers CLIP text": hf("CLIPTextModel", "CLIPTextConfig", T, **CLIP_TEXT),
    "transformers CLIP vision": hf("CLIPVisionModel", "CLIPVisionConfig", PX, **VISION),
    "transformers Whisper": hf(
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {"input_features": torch.randn(2, 8, 40), "decoder_input_ids": IDS},
        num_mel_bins=8,
        max_source_positions=20,
        max_target_positions=20,
        **PAIR,
        **SPECIAL,
    ),
    "transformers Phi": hf("PhiForCausalLM", "PhiConfig", T, **TEXT, **SPECIAL),
    "transformers Falcon": hf("FalconForCausalLM", "FalconConfig", T, **TEXT, **SPECIAL),
    "transformers StableLM": hf(
        "StableLmForCausalLM", "StableLmConfig", T, num_key_value_heads=2, **TEXT, **SPECIAL
    ),
    "transformers CodeGen": hf(
        "CodeGenForCausalLM", "CodeGenConfig", T, rotary_dim=4, **GPT | {"n_head": 4}, **SPECIAL
    ),
    "transformers GPTNeo": hf(
        "GPTNeoForCausalLM",
        "GPTNeoConfig",
        T,
        num_layers=2,
        num_heads=2,
        hidden_size=32,
        attention_types=[[["global", "local"], 1]],
        **SPECIAL,
    ),
    "transformers GPTBigCode": hf("GPTBigCodeForCausalLM", "GPTBigCodeConfig", T, **GPT, **SPECIAL),
    "transformers MPT": hf(
        "MptForCausalLM",
        "MptConfig",
        T,
        d_model=32,
        n_heads=2,
        n_layers=2,
        max_seq_len=32,
        **SPECIAL,
    ),
    "transformers Persimmon": hf("PersimmonForCausalLM", "PersimmonConfig", T, **TEXT, **SPECIAL),
    "transformers XGLM": hf(
        "XGLMForCausalLM",
        "XGLMConfig",
        T,
        d_model=32,
        ffn_dim=64,
        num_layers=2,
        attention_heads=2,
        **SPECIAL,
    ),
    "transformers BioGPT": hf("BioGptForCausalLM", "BioGptConfig", T, **TEXT, **SPECIAL),
    "transformers Nemotron": hf(
        "NemotronForCausalLM",
        "NemotronConfig",
        T,
        num_key_value_heads=2,
        head_dim=16,
        **TEXT,
        **SPECIAL,
    ),
    "transformers Cohere": hf("CohereForCausalLM", "CohereConfig", T, **TEXT, **SPECIAL),
    "transformers OLMo": hf("OlmoForCausalLM", "OlmoConfig", T, **TEXT, **SPECIAL),
    "transformers Starcoder2": hf(
        "Starcoder2ForCausalLM", "Starcoder2Config", T, num_key_value_heads=2, **TEXT, **SPECIAL
    ),
    "transformers XLM-RoBERTa-XL": hf(
        "XLMRobertaXLModel", "XLMRobertaXLConfig", T, **TEXT, **SPECIAL
    ),
    "transformers MegatronBERT": hf(
        "MegatronBertModel", "MegatronBertConfig", T, **TEXT, vocab_size=99
    ),
    "transformers RoBERTa-PreLN": hf(
        "RobertaPreLayerNormModel", "RobertaPreLayerNormConfig", T, **TEXT, **SPECIAL
    ),
    "transformers ESM": hf(
        "EsmModel", "EsmConfig", T, mask_token_id=4, vocab_size=99, pad_token_id=0, **TEXT
    ),
    "transformers CTRL": hf("CTRLModel", "CTRLConfig", T, dff=64, vocab_size=99, **GPT),
    "transformers mBART": hf(
        "MBartForConditionalGeneration",
        "MBartConfig",
        TT,
        max_position_embeddings=32,
        **PAIR,
        **SPECIAL,
    ),
    "transformers Pegasus": hf(
        "PegasusForConditionalGeneration",
        "PegasusConfig",
        TT,
        max_position_embeddings=32,
        **PAIR,
        **SPECIAL,
    ),
    "transformers M2M100": hf(
        "M2M100ForConditionalGeneration",
        "M2M100Config",
        TT,
        max_position_embeddings=32,
        **PAIR,
        **SPECIAL,
    ),
    "transformers Blenderbot": hf(
        "BlenderbotForConditionalGeneration",
        "BlenderbotConfig",
        TT,
        max_position_embeddings=32,
        **PAIR,
        **SPECIAL,
    ),
    "transformers Speech2Text": hf(
        "Speech2TextForConditionalGeneration",
        "Speech2TextConfig",
        {"input_features": torch.randn(2, 24, 8), "decoder_input_ids": IDS},
        input_feat_per_channel=8,
        conv_channels=16,
        max_source_positions=40,
        max_target_positions=32,
        **PAIR,
        **SPECIAL,
    ),
    "transformers MusicGen": hf(
        "MusicgenForCausalLM",
        "MusicgenDecoderConfig",
        {"input_ids": torch.randint(0, 39, (4, 7))},
        vocab_size=40,
        num_hidden_layers=2,
        ffn_dim=64,
        num_attention_heads=2,
        hidden_size=32,
        num_codebooks=2,
        pad_token_id=39,
        bos_token_id=1,
    ),
    "transformers Moonshine": hf(
        "MoonshineModel",
        "MoonshineConfig",
        {"input_values": torch.randn(2, 4000), "decoder_input_ids": IDS},
        hidden_size=32,
        intermediate_size=64,
        encoder_num_hidden_layers=2,
        decoder_num_hidden_layers=2,
        encoder_num_attention_heads=2,
        decoder_num_attention_heads=2,
        **SPECIAL,
    ),
    "transformers Wav2Vec2 stable": hf("Wav2Vec2Model", "Wav2Vec2Config", WV, **STABLE),
    "transformers HuBERT stable": hf("HubertModel", "HubertConfig", WV, **STABLE),
    "transformers WavLM stable": hf("WavLMModel", "WavLMConfig", WV, **STABLE),
    "transformers UniSpeechSat stable": hf("UniSpeechSatModel", "UniSpeechSatConfig", WV, **STABLE),
    "transformers Wav2Vec2 Conformer": hf(
        "Wav2Vec2ConformerModel",
        "Wav2Vec2ConformerConfig",
        WV,
        position_embeddings_type="rotary",
        **AUDIO,
    ),
    "transformers AST": hf(
        "ASTModel",
        "ASTConfig",
        {"input_values": torch.randn(2, 32, 16)},
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_length=32,
        num_mel_bins=16,
        patch_size=8,
        frequency_stride=8,
        time_stride=8,
    ),
    "transformers DeiT": hf("DeiTModel", "DeiTConfig", PX, **VISION),
    "transformers BEiT": hf("BeitModel", "BeitConfig", PX, **VISION),
    "transformers DINOv2": hf("Dinov2Model", "Dinov2Config", PX, **VISION),
    "transformers DINOv3": hf("DINOv3ViTModel", "DINOv3ViTConfig", PX, **VISION),
    "transformers ViTMAE": hf(
        "ViTMAEForPreTraining",
        "ViTMAEConfig",
        PX,
        decoder_hidden_size=16,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=32,
        **VISION,
    ),
    "transformers ViTMSN": hf("ViTMSNModel", "ViTMSNConfig", PX, **VISION),
    "transformers SigLIP vision": hf("SiglipVisionModel", "SiglipVisionConfig", PX, **VISION),
    "transformers I-JEPA": hf("IJepaModel", "IJepaConfig", PX, **VISION),
    "transformers YOLOS": hf(
        "YolosModel",
        "YolosConfig",
        PX,
        **VISION | {"image_size": [32, 32], "num_detection_tokens": 3},
    ),
    "transformers TimeSformer": hf(
        "TimesformerModel", "TimesformerConfig", FRAMES, num_frames=4, **VISION
    ),
    "transformers VideoMAE": hf("VideoMAEModel", "VideoMAEConfig", FRAMES, num_frames=4, **VISION),
    "transformers FLAVA image": hf("FlavaImageModel", "FlavaImageConfig", PX, **VISION),
    "transformers SegFormer": hf(
        "SegformerModel",
        "SegformerConfig",
        PX,
        hidden_sizes=[16] * 4,
        depths=[1] * 4,
        num_attention_heads=[1, 1, 2, 2],
    ),
    "transformers BERT": hf("BertModel", "BertConfig", T, **TEXT, vocab_size=99),
    "transformers BART": hf(
        "BartModel", "BartConfig", TT, max_position_embeddings=32, **PAIR, **SPECIAL
    ),
    "transformers T5": hf(
        "T5Model",
        "T5Config",
        TT,
        d_model=32,
        d_kv=16,
        num_layers=2,
        num_heads=2,
        d_ff=64,
        vocab_size=99,
        decoder_start_token_id=0,
    ),
    "transformers Llama": hf("LlamaModel", "LlamaConfig", T, **TEXT, **SPECIAL),
    "transformers ModernBERT": hf(
        "ModernBertModel", "ModernBertConfig", T, cls_token_id=1, sep_token_id=2, **TEXT, **SPECIAL
    ),
    "transformers Swin": hf(
        "SwinModel",
        "SwinConfig",
        PX,
        image_size=32,
        patch_size=4,
        embed_dim=16,
        depths=[1, 1],
        num_heads=[2, 2],
        window_size=4,
    ),
    "transformers ConvNeXt": hf(
        "ConvNextModel", "ConvNextConfig", PX, hidden_sizes=[16] * 4, depths=[1] * 4
    ),
    "transformers SAM vision": hf(
        "SamVisionModel",
        "SamVisionConfig",
        PX,
        output_channels=16,
        window_size=2,
        global_attn_indexes=[1],
        num_pos_feats=8,
        mlp_dim=64,
        **{k: v for k, v in VISION.items() if k != "intermediate_size"},
    ),
    "transformers PVT": hf(
        "PvtModel",
        "PvtConfig",
        PX,
        hidden_sizes=[16] * 4,
        depths=[1] * 4,
        num_attention_heads=[1, 1, 2, 2],
        image_size=32,
    ),
    "transformers ResNet": hf(
        "ResNetModel",
        "ResNetConfig",
        PX,
        embedding_size=8,
        hidden_sizes=[8, 8],
        depths=[1, 1],
        layer_type="basic",
    ),
    "timm vit": tm("vit_tiny_patch16_224"),
    "timm deit3": tm("deit3_small_patch16_224"),
    "timm mixer": of_class("timm.models.MlpMixer", (IMAGE,), **MIXER),
    "timm beit": tm("beit_base_patch16_224"),
    "timm eva02": tm("eva02_tiny_patch14_224", patch_size=8),
    "timm cait": tm("cait_xxs24_224"),
    "timm xcit": tm("xcit_nano_12_p8_224"),
    "timm vit with registers": tm("vit_base_patch14_reg4_dinov2", patch_size=8),
    "timm vit, average pool": tm("vit_base_patch16_siglip_gap_224"),
    "timm vit, attention pool": tm("vit_base_patch16_siglip_224"),
    "torchvision vit": tv("vit"),
    "torchvision swin": tv("swin"),
    "transformers GPTNeoX Japanese": hf(
        "GPTNeoXJapaneseForCausalLM", "GPTNeoXJapaneseConfig", T, **TEXT, **SPECIAL
    ),
    "transformers GPT2 classifier, scaled by layer": hf(
        "GPT2ForSequenceClassification",
        "GPT2Config",
        T,
        scale_attn_by_inverse_layer_idx=True,
        **GPT,
        **SPECIAL,
    ),
    "transformers GPT2 with cross-attention": hf(
        "GPT2LMHeadModel",
        "GPT2Config",
        T | {"encoder_hidden_states": torch.randn(2, 5, 32)},
        add_cross_attention=True,
        **GPT,
        **SPECIAL,
    ),
    "transformers GPTBigCode multi-head": hf(
        "GPTBigCodeForTokenClassification",
        "GPTBigCodeConfig",
        T,
        multi_query=False,
        **GPT,
        **SPECIAL,
    ),
    "transformers OPT projected": hf(
        "OPTForQuestionAnswering",
        "OPTConfig",
        T,
        **TEXT,
        ffn_dim=64,
        word_embed_proj_dim=16,
        **SPECIAL,
    ),
    "transformers OPT Post-LN": hf(
        "OPTForCausalLM",
        "OPTConfig",
        T,
        **TEXT,
        ffn_dim=64,
        word_embed_proj_dim=32,
        do_layer_norm_before=False,
        **SPECIAL,
    ),
    "transformers BLOOM, residual behind the norm": hf(
        "BloomForCausalLM",
        "BloomConfig",
        T,
        n_layer=2,
        n_head=2,
        hidden_size=32,
        apply_residual_connection_post_layernorm=True,
        **SPECIAL,
    ),
    "transformers Falcon new": hf(
        "FalconForCausalLM",
        "FalconConfig",
        T,
        new_decoder_architecture=True,
        num_kv_heads=1,
        **TEXT,
        **SPECIAL,
    ),
    "transformers Falcon ALiBi": hf(
        "FalconForCausalLM",
        "FalconConfig",
        T,
        alibi=True,
        parallel_attn=False,
        bias=True,
        multi_query=False,
        **TEXT,
        **SPECIAL,
    ),
    "transformers StableLM parallel": hf(
        "StableLmForCausalLM",
        "StableLmConfig",
        T,
        num_key_value_heads=2,
        use_parallel_residual=True,
        qk_layernorm=True,
        **TEXT,
        **SPECIAL,
    ),
    "transformers Phi with norms of q and k": hf(
        "PhiForCausalLM", "PhiConfig", T, qk_layernorm=True, **TEXT, **SPECIAL
    ),
    "transformers Fuyu": hf("FuyuForCausalLM", "FuyuConfig", T, **TEXT, **SPECIAL),
    "transformers Cohere2": hf(
        "Cohere2ForCausalLM",
        "Cohere2Config",
        T,
        num_key_value_heads=2,
        sliding_window=4,
        **TEXT,
        **SPECIAL,
    ),
    "transformers Jais2": hf(
        "Jais2ForCausalLM", "Jais2Config", T, num_key_value_heads=2, **TEXT, **SPECIAL
    ),
    "transformers RWKV": hf(
        "RwkvForCausalLM",
        "RwkvConfig",
        T,
        hidden_size=32,
        attention_hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        **SPECIAL,
    ),
    "transformers Decision Transformer": hf(
        "DecisionTransformerModel",
        "DecisionTransformerConfig",
        {
            "states": torch.randn(2, 4, 5),
            "actions": torch.randn(2, 4, 3),
            "rewards": torch.randn(2, 4, 1),
            "returns_to_go": torch.randn(2, 4, 1),
            "timesteps": torch.arange(4).expand(2, 4),
            "attention_mask": torch.ones(2, 4, dtype=torch.long),
        },
        state_dim=5,
        act_dim=3,
        max_ep_len=20,
        hidden_size=32,
        n_layer=2,
        n_head=2,
    ),
    "transformers BigBird-Pegasus": hf(
        "BigBirdPegasusForConditionalGeneration",
        "BigBirdPegasusConfig",
        TT,
        max_position_embeddings=32,
        attention_type="original_full",
        **PAIR,
        **SPECIAL,
    ),
    "transformers NLLB-MoE": hf(
        "NllbMoeForConditionalGeneration",
        "NllbMoeConfig",
        TT,
        max_position_embeddings=32,
        num_experts=2,
        **PAIR,
        **SPECIAL,
    ),
    "transformers Marian": hf(
        "MarianMTModel", "MarianConfig", TT, max_position_embeddings=32, **PAIR, **SPECIAL
    ),
    "transformers Wav2Vec2-BERT": hf(
        "Wav2Vec2BertModel",
        "Wav2Vec2BertConfig",
        {"input_features": torch.randn(2, 10, 160)},
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
    ),
    "transformers UniSpeech stable": hf("UniSpeechModel", "UniSpeechConfig", WV, **STABLE),
    "transformers Wav2Vec2 CTC, masked": hf(
        "Wav2Vec2ForCTC",
        "Wav2Vec2Config",
        WV | {"attention_mask": torch.tensor([[1] * 800, [1] * 600 + [0] * 200])},
        **STABLE,
    ),
    "transformers FLAVA text": hf("FlavaTextModel", "FlavaTextConfig", T, **TEXT, vocab_size=99),
    "transformers SigLIP classifier": hf(
        "SiglipForImageClassification", "SiglipConfig", PX, vision_config=VISION
    ),
    "transformers BLIP vision": hf("BlipVisionModel", "BlipVisionConfig", PX, **VISION),
    "transformers DINOv2 with registers": hf(
        "Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", PX, **VISION
    ),
    "transformers DINOv2 SwiGLU": hf(
        "Dinov2ForImageClassification", "Dinov2Config", PX, use_swiglu_ffn=True, **VISION
    ),
    "transformers ViT, masked pixels": hf(
        "ViTForMaskedImageModeling",
        "ViTConfig",
        PX | {"bool_masked_pos": torch.arange(16).expand(2, 16) % 3 == 0},
        encoder_stride=8,
        **VISION,
    ),
    "transformers ViViT": hf(
        "VivitModel", "VivitConfig", FRAMES, num_frames=4, tubelet_size=[2, 8, 8], **VISION
    ),
    "transformers ViLT": hf(
        "ViltModel", "ViltConfig", T | PX, vocab_size=99, max_position_embeddings=32, **VISION
    ),
    "timm vit, CLIP": tm("vit_base_patch16_clip_224"),
    "timm vit, rotary": tm("vit_base_patch16_rope_224"),
    "timm vit, relative positions": tm("vit_relpos_base_patch16_224"),
    "timm vit, parallel": tm("vit_small_patch16_18x2_224"),
    "timm convit": tm("convit_tiny"),
    "timm flexivit": tm("flexivit_small"),
    "transformers Pegasus-X": hf(
        "PegasusXModel",
        "PegasusXConfig",
        {"input_ids": torch.arange(32).view(2, 16) + 5, "decoder_input_ids": IDS},
        num_global_tokens=4,
        block_size=8,
        max_position_embeddings=32,
        **PAIR,
        **SPECIAL,
    ),
    "transformers PVTv2": hf(
        "PvtV2Model",
        "PvtV2Config",
        PX,
        hidden_sizes=[16] * 4,
        depths=[1] * 4,
        num_attention_heads=[1, 1, 2, 2],
        image_size=32,
    ),
    "transformers GLPN": hf(
        "GLPNModel",
        "GLPNConfig",
        PX,
        hidden_sizes=[16] * 4,
        depths=[1] * 4,
        num_attention_heads=[1, 1, 2, 2],
    ),
    "transformers Hiera": hf(
        "HieraModel",
        "HieraConfig",
        PX,
        embed_dim=16,
        image_size=[32, 32],
        patch_size=[7, 7],
        depths=[1, 1],
        num_heads=[1, 2],
        query_stride=[2, 2],
        masked_unit_size=[2, 2],
        num_query_pool=1,
    ),
    "transformers SigLIP2 vision": hf(
        "Siglip2VisionModel",
        "Siglip2VisionConfig",
        {
            "pixel_values": torch.randn(2, 16, 192),
            "pixel_attention_mask": torch.ones(2, 16, dtype=torch.long),
            "spatial_shapes": torch.tensor([[4, 4], [4, 4]]),
        },
        num_patches=16,
        **{k: v for k, v in VISION.items() if k != "image_size"},
    ),
    "transformers Idefics3 vision": hf(
        "Idefics3VisionTransformer", "Idefics3VisionConfig", PX, **VISION
    ),
    "transformers CLIP vision with projection": hf(
        "CLIPVisionModelWithProjection", "CLIPVisionConfig", PX, projection_dim=16, **VISION
    ),
    "transformers PatchTST Pre-LN": hf(
        "PatchTSTModel",
        "PatchTSTConfig",
        {"past_values": torch.randn(2, 32, 3)},
        num_input_channels=3,
        context_length=32,
        patch_length=8,
        patch_stride=8,
        d_model=32,
        num_attention_heads=2,
        ffn_dim=64,
        num_hidden_layers=2,
        norm_type="layernorm",
        pre_norm=True,
    ),
    "transformers Swin v2": hf(
        "Swinv2Model",
        "Swinv2Config",
        PX,
        image_size=32,
        patch_size=4,
        embed_dim=16,
        depths=[1, 1],
        num_heads=[2, 2],
        window_size=4,
    ),
    "timm gmixer": gmixer,
    "timm gmlp": gmlp,
    "timm gcvit": of_class(
        "timm.models.GlobalContextVit",
        (torch.randn(2, 3, 64, 64),),
        img_size=64,
        window_size=4,
        depths=(1, 1),
        num_heads=(2, 2),
        embed_dim=16,
        num_classes=10,
    ),
    "timm volo": of_class(
        "timm.models.VOLO",
        (IMAGE,),
        layers=[1, 1],
        img_size=32,
        patch_size=8,
        embed_dims=[16, 32],
        num_heads=[2, 2],
        mlp_ratio=(3.0, 3.0),
        downsamples=(True, False),
        outlook_attention=(True, False),
        post_layers=None,
        num_classes=10,
        use_mix_token=False,
    ),
    "timm tnt": of_class(
        "timm.models.TNT",
        (IMAGE,),
        img_size=32,
        patch_size=16,
        embed_dim=48,
        inner_dim=16,
        depth=2,
        num_heads_inner=2,
        num_heads_outer=2,
        num_classes=10,
    ),
    "timm vit, rotary with registers": tm("vit_betwixt_patch16_rope_reg4_gap_256"),
    "torchvision vit, convolutional stem": tv("vit, stem"),
    "torchvision maxvit": tv("maxvit"),
    "torchvision mvit": mvit,
    "vit-pytorch ViT": of_class("vit_pytorch.ViT", (IMAGE,), **VIT_PYTORCH),
    "vit-pytorch SimpleViT": of_class("vit_pytorch.SimpleViT", (IMAGE,), **VIT_PYTORCH),
    "vit-pytorch XCiT": of_class("vit_pytorch.xcit.XCiT", (IMAGE,), cls_depth=1, **VIT_PYTORCH),
    "vit-pytorch DeepViT": of_class("vit_pytorch.deepvit.DeepViT", (IMAGE,), **VIT_PYTORCH),
    "vit-pytorch CaiT": of_class("vit_pytorch.cait.CaiT", (IMAGE,), cls_depth=1, **VIT_PYTORCH),
    "nn.Transformer": pair,
    "nn.TransformerEncoder": encoder(),
    "nn.TransformerEncoder without a last norm": encoder(final=False),
}

#: Where the conversion is asked to keep some outputs alone.
OUTPUTS = {
    "transformers CLIP vision, pooled": ("transformers CLIP vision", ["pooler_output"]),
    "transformers CLIP vision, projected": (
        "transformers CLIP vision with projection",
        ["image_embeds"],
    ),
}
