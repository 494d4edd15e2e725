"""Names of torch functions by the rule that they follow, without underscores at their ends."""

__all__ = ["BINARY", "ELEMENTWISE", "POOLS", "REDUCTIONS", "RESHAPES"]

# fmt: off
ELEMENTWISE = (
    "abs", "bfloat16", "celu", "clamp", "clamp_max", "clamp_min", "clone", "contiguous", "cpu", "cuda", "detach",
    "double", "dropout", "dropout1d", "dropout2d", "dropout3d", "elu", "erf", "exp", "float", "gelu", "half",
    "hardsigmoid", "hardswish", "hardtanh", "leaky_relu", "log", "log1p", "log_sigmoid", "logsigmoid", "mish",
    "nan_to_num", "neg", "relu", "relu6", "rsqrt", "selu", "sigmoid", "sign", "silu", "softplus", "softsign", "sqrt",
    "square", "tanh", "tanhshrink", "to", "type_as", "alpha_dropout", "feature_dropout", "log_softmax", "softmax",
    "feature_alpha_dropout",
)

BINARY = (
    "add", "sub", "mul", "div", "true_divide", "radd", "rsub", "rmul", "rtruediv", "truediv", "iadd", "isub", "imul",
    "itruediv", "maximum", "minimum", "pow",
)

POOLS = (
    "max_pool1d", "avg_pool1d", "adaptive_max_pool1d", "adaptive_avg_pool1d", "max_pool2d", "avg_pool2d",
    "adaptive_max_pool2d", "adaptive_avg_pool2d", "max_pool3d", "avg_pool3d", "adaptive_max_pool3d",
    "adaptive_avg_pool3d",
)
# fmt: on

REDUCTIONS = ("mean", "sum", "amax", "amin")
RESHAPES = ("reshape", "view", "flatten", "unflatten", "squeeze", "unsqueeze")
