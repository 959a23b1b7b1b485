"""Published networks of the sweep: all classifiers of torchvision's, one of each module of timm's.

Of each module of timm's it is the smallest. Some modules hold several kinds of networks: of these
more are here. timm's deepseek_vit has 400 million weights at the least and is left out.
"""

from __future__ import annotations

from typing import Any

import timm
import torch
import torchvision
from torch import nn

from aftcli import load_classifier

SMALLEST = """
beit_base_patch16_224 cait_xxs24_224 coat_tiny convit_tiny convmixer_768_32 convnext_zepto_rms
cpubone_nano crossvit_tiny_240 cs3darknet_focus_s csatv2 cspnext_tiny davit_tiny
deit_tiny_patch16_224 densenet121 dla46x_c dpn48b edgenext_xx_small efficientformer_l1
efficientformerv2_s0 efficientvim_m1 efficientvit_b0 efficientvit_m0 ese_vovnet19b_slim_dw
fasternet_t0 fastvit_t8 focalnet_tiny_srf gcvit_xxtiny gemma4_vit_167m ghostnet_050
gmlp_ti16_224 halonet_h1 hardcorenas_b hgnetv2_b0 hiera_tiny_224 hrnet_w18_small iformer_t
inception_next_atto inception_resnet_v2 inception_v3 inception_v4 lcnetv2_small
legacy_seresnet18 legacy_xception levit_128s lowformer_b0 mambaout_femto maxvit_pico_rw_256
mobilenetv2_035 mobilenetv3_small_050 mobilenetv5_base mobileone_s1 mobilevit_xxs mvitv2_tiny
naflexvit_base_patch16_parfac_gap nasnetalarge nest_tiny nextvit_small nf_regnet_b0 pit_ti_224
pnasnet5large poolformerv2_s12 pvt_v2_b0 qwen3_vit_88m rdnet_tiny regnetx_002 repghostnet_050
repvit_m1 res2next50 resnest14d resnet10t resnetv2_18 rexnet_100 sam2_hiera_tiny
samvit_base_patch16_224 selecsls42 sequencer2d_s shvit_s1 skresnet18 starnet_s050 swiftformer_xs
swin_tiny_patch4_window7_224 swinv2_cr_tiny_224 swinv2_tiny_window8_256 tiny_vit_5m_224
tnt_s_legacy_patch16_224 tresnet_m twins_svt_small vgg11 visformer_tiny
vit_srelpos_small_patch16_224 vit_tiny_patch16_224 vit_tiny_patch16_dinov3_qkvb
vit_tiny_r_s16_p8_224 vitamin_small_224 volo_d1_224 xception41p xcit_nano_12_p8_224
""".split()
OTHER_KINDS = """
botnet26t_256 caformer_s18 coat_lite_tiny coatnet_pico_rw_224 coatnext_nano_rw_224
convformer_s18 convnextv2_atto deit3_small_patch16_224 deit_tiny_distilled_patch16_224
eca_halonext26ts ecaresnet26t efficientnet_b0 efficientnet_lite0 eva02_tiny_patch14_224
fastvit_mci0 flexivit_small gcresnext26ts ghostnetv2_100 gmixer_12_224 hieradet_small
lambda_resnet26t lcnet_050 levit_conv_128s maxxvit_rmlp_nano_rw_256 mixer_s32_224 mixnet_s
mobilenetv4_conv_small_035 mobilenetv4_hybrid_medium_075 mobilevitv2_050 mvitv2_small_cls
nf_resnet26 pit_ti_distilled_224 poolformer_s12 regnety_002 repvgg_a0 resmlp_12_224
resnet50_clip resnetv2_50d_gn seresnet18 swin_s3_tiny_224 tf_efficientnetv2_b0 tinynet_e
twins_pcpvt_small vit_small_patch16_rope_224 vit_wee_patch16_reg1_gap_256
""".split()
SIDES = {"inception_v3": 299, "swin_v2_t": 256, "swin_v2_s": 256, "swin_v2_b": 256}
# Published for larger images than a sweep needs; pixels.
SMALLER = {"gemma4_vit_167m": 224, "qwen3_vit_88m": 224, "sam2_hiera_tiny": 224}
ANY_SIZE = {"sam2_hiera_tiny"}  # of these: it is not told its size
# Small ones, of which `load_classifier` is asked for its layer, too.
LOADED = """
alexnet densenet121 efficientnet_b0 googlenet mnasnet0_5 mobilenet_v2 mobilenet_v3_small
regnet_x_400mf resnet18 resnet50 shufflenet_v2_x0_5 squeezenet1_0 squeezenet1_1 vgg16 vit_b_32
swin_t timm:convnext_zepto_rms timm:efficientnet_lite0 timm:vit_tiny_patch16_224 timm:mixer_s32_224
""".split()
NEARLY = 1e-3  # the largest of a weight's numbers
CLASSES = 10  # of a network that is published without


def names() -> list[str]:
    """List the networks, as `load_classifier` takes their names."""
    ours = torchvision.models.list_models(module=torchvision.models)
    return [*ours, *(f"timm:{name}" for name in sorted([*SMALLEST, *OTHER_KINDS]))]


def build(name: str) -> tuple[nn.Module, tuple[int, int]]:
    """Build a network with random weights; return it and its input size, pixels.

    Weights that begin as 0, or nearly, become larger: they hide what lies behind them.
    """
    torch.manual_seed(0)
    model, side = _timm(name[5:]) if name.startswith("timm:") else _torchvision(name)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.abs().max() < NEARLY:
                weight.normal_(0, 0.1)
    return model.eval().requires_grad_(False), (side, side)


def _torchvision(name: str) -> tuple[nn.Module, int]:
    options: dict[str, Any] = (
        {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    )
    return torchvision.models.get_model(name, weights=None, **options), SIDES.get(name, 224)


def _timm(name: str) -> tuple[nn.Module, int]:
    cfg = timm.get_pretrained_cfg(name, allow_unregistered=False)
    options: dict[str, Any] = {} if cfg.num_classes else {"num_classes": CLASSES}
    side = cfg.input_size[-1]
    if name in SMALLER:
        side = SMALLER[name]
        options |= {} if name in ANY_SIZE else {"img_size": side}
    return timm.create_model(name, **options), side


def loaded_layer(name: str) -> str:
    """Return the layer at which `load_classifier` cuts a network."""
    return load_classifier(name, weights=False).layer_name
