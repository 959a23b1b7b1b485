"""Promises of other libraries' methods, asked of ours.

Each test names the peer and the test whose behaviour it checks, as in
`torchcam: test_methods_gradient.py::test_img_cams`. The tests are our own: small networks, the
peer's numbers where it is installed (pytorch-grad-cam 1.5.7, torchcam 0.5.0, captum 0.9,
zennit 0.5), otherwise a literal loop in float64.

What aft refuses on purpose, so that no test asks for it:

- Hooks that are switched on and off, removed twice, or kept for the next call: a cut network has
  none.
- Methods that add no kind of evidence to ours: SSCAM, ISCAM and LeGrad (torchcam); FullGrad,
  KPCA-CAM, Eigen-Grad-CAM, Seg-Eigen-CAM, Shapley-CAM (pytorch-grad-cam); DeepLiftSHAP, VarGrad,
  deconvolution, neuron and layer attributions (captum).
- Settings of methods, measures and pictures that a paper fixes: baselines, windows, strides,
  steps, noise levels, the relevance rule of each layer, opacity, colours.
- Inputs that are no images: vectors, sequences, several inputs, additional arguments, integers.
- Attributions of a neuron or of a layer by a method of pixels, convergence deltas, futures,
  second derivatives of attributions.
- Their own tools: command lines, latency, colour maps, canonizers, serialisation of objects.
"""
