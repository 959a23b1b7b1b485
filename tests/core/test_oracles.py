"""Grad-CAM and Layer-CAM against two other libraries, where those are right.

Their Grad-CAM++ and Ablation-CAM are not (docs/method/decisions/maps.md), so they are not here.
The libraries' epsilons differ, so raw maps are taken and scaled here.
"""

import pytest
import pytorch_grad_cam
import torch
import torchcam.methods
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torchvision.models import get_model

from aftcli.core.cam import scaled_map
from aftcli.models.load import load_classifier
from tests.helpers.compare import uncut
from tests.reference import paper as reference

pytestmark = pytest.mark.slow

METHODS = {
    "gradcam": (pytorch_grad_cam.GradCAM, torchcam.methods.GradCAM),
    "layercam": (pytorch_grad_cam.LayerCAM, torchcam.methods.LayerCAM),
}
# Layer l's first and last module.
LAYERS = {
    "resnet50": ("layer4.2", "layer4.2"),
    "vgg16": ("features.28", "features.29"),
    "efficientnet_lite0": ("conv_head", "bn2"),
}


def pytorch_grad_cam_map(method, model, layer, x, c):
    """Raw map, shape (h, w), before ReLU and scaling."""
    target, module = ClassifierOutputTarget(c), model.get_submodule(layer)
    with METHODS[method][0](model, [module]) as extractor:
        extractor(x, [target])
        (activation,) = extractor.activations_and_grads.activations
        (gradient,) = extractor.activations_and_grads.gradients
        raw = extractor.get_cam_image(
            x, module, [target], activation.numpy(), gradient.numpy(), False
        )
    return raw[0]


def torchcam_map(method, model, layer, x, c):
    """Raw map, shape (h, w), after ReLU, before scaling."""
    with METHODS[method][1](model, layer) as extractor:
        (raw,) = extractor(c, model(x), normalized=False)
    return raw[0].detach().numpy()


@pytest.fixture(scope="module", params=LAYERS)
def explained(request):
    """An uncut network, the same cut, layer l's last module, an input and its second best class."""
    name = request.param
    if name == "efficientnet_lite0":
        model, f = (request.getfixturevalue(v) for v in ("uncut_lite0", "lite0"))
        x = request.getfixturevalue("chelsea")
    else:
        torch.manual_seed(0)
        f = load_classifier(name, weights=False)
        with torch.device("meta"):
            model = get_model(name)
        model = uncut(f, model)
        x = torch.randn(1, 3, 224, 224)
    first, last = LAYERS[name]
    # The oracles go backwards as far as weights ask for it.
    model.requires_grad_(False).get_submodule(first).requires_grad_(True)
    with torch.no_grad():
        logits = model(x)
    return model, f, last, x, logits[0].argsort(descending=True)[1].item()


@pytest.mark.parametrize("oracle", [pytorch_grad_cam_map, torchcam_map])
@pytest.mark.parametrize("method", METHODS)
def test_map_equals_the_other_librarys(method, oracle, explained):
    model, f, layer, x, c = explained
    expected = reference.scale(oracle(method, model, layer, x, c).clip(min=0))
    assert expected.max() == 1
    # Many cells must take part, or little is compared.
    assert (expected > 0.01).sum() > 10
    with torch.no_grad():
        activation = f.activation(x)
    ours = scaled_map(f, activation, torch.tensor([c]), x, method)[0]
    assert (ours - torch.from_numpy(expected)).abs().max() <= 1e-5
