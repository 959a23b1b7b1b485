"""Networks cut at a layer: f(x) = head(layer(stem(x))), the paper's w0, w1, w2 (§4.2)."""
