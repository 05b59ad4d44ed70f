"""What is compared with torch: layers, losses, optimizers and schedules, as expressions for both libraries.

`record_nn.py` runs torch's side once and keeps its answers in `nn.npz`; `tests/nn/` runs ours against them.
The first expression is evaluated with `torch.nn` (or torch.optim), the second (None: the same) with ours.
"""

LAYERS = [
    # name, torch expression, our expression, shapes of the inputs ("i9" after a shape: integers below 9)
    ("linear", "Linear(5, 7)", None, [(3, 5)]),
    ("linear_vector", "Linear(5, 7, bias=False)", None, [(5,)]),
    ("bilinear", "Bilinear(3, 4, 5)", None, [(2, 3), (2, 4)]),
    ("embedding", "Embedding(9, 4, padding_idx=2)", None, [((3, 5), "i9")]),
    ("conv1d", "Conv1d(3, 6, 3, stride=2, padding=1, dilation=2, groups=3)", None, [(2, 3, 11)]),
    ("conv2d", "Conv2d(3, 5, (3, 2), stride=(2, 1), padding=(1, 0))", None, [(2, 3, 9, 7)]),
    ("conv2d_same", "Conv2d(2, 3, 4, padding='same', dilation=2)", None, [(1, 2, 9, 8)]),
    ("conv3d", "Conv3d(2, 3, 2, padding=1)", None, [(1, 2, 4, 3, 5)]),
    ("conv_transpose1d", "ConvTranspose1d(4, 6, 3, stride=2, padding=1, output_padding=1)", None, [(2, 4, 5)]),
    ("conv_transpose2d", "ConvTranspose2d(4, 6, 3, stride=2, groups=2, dilation=2)", None, [(2, 4, 4, 5)]),
    ("conv_transpose3d", "ConvTranspose3d(2, 3, 2, stride=2)", None, [(1, 2, 2, 3, 2)]),
    ("batch_norm", "BatchNorm2d(4)", None, [(3, 4, 5, 2)]),
    ("batch_norm_eval", "BatchNorm1d(4).eval()", None, [(3, 4)]),
    ("layer_norm", "LayerNorm((4, 3))", None, [(2, 5, 4, 3)]),
    ("layer_norm_plain", "LayerNorm(6, elementwise_affine=False)", None, [(2, 6)]),
    ("rms_norm", "RMSNorm(6, eps=1e-6)", None, [(2, 3, 6)]),
    ("group_norm", "GroupNorm(3, 6)", None, [(2, 6, 4)]),
    ("instance_norm", "InstanceNorm2d(3, affine=True)", "InstanceNorm(3, affine=True)", [(2, 3, 4, 5)]),
    ("max_pool1d", "MaxPool1d(3, 2, 1)", None, [(2, 3, 8)]),
    ("max_pool2d", "MaxPool2d(3, stride=2, padding=1)", None, [(2, 3, 8, 7)]),
    ("avg_pool2d", "AvgPool2d(3, stride=2, padding=1, count_include_pad=False)", None, [(2, 3, 8, 7)]),
    ("avg_pool3d", "AvgPool3d(2)", None, [(1, 2, 4, 5, 4)]),
    ("adaptive_avg_pool", "AdaptiveAvgPool2d((3, 2))", None, [(2, 3, 7, 4)]),
    ("rnn", "RNN(5, 4, num_layers=2, nonlinearity='relu')", None, [(6, 3, 5)]),
    ("lstm", "LSTM(5, 4, num_layers=2, bidirectional=True)", None, [(6, 3, 5)]),
    ("lstm_batch_first", "LSTM(5, 4, batch_first=True, bias=False)", None, [(3, 6, 5)]),
    ("gru", "GRU(5, 4, num_layers=2, bidirectional=True)", None, [(6, 3, 5)]),
    ("encoder_layer", "TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)",
     "TransformerEncoderLayer(8, 2, 16, dropout=0.0)", [(3, 5, 8)]),
    ("encoder_layer_first", "TransformerEncoderLayer(8, 4, 16, dropout=0.0, batch_first=True, norm_first=True, "
     "activation='gelu')", "TransformerEncoderLayer(8, 4, 16, dropout=0.0, norm_first=True, activation='gelu')",
     [(3, 5, 8)]),
    ("decoder_layer", "TransformerDecoderLayer(8, 2, 16, dropout=0.0, batch_first=True)",
     "TransformerDecoderLayer(8, 2, 16, dropout=0.0)", [(3, 5, 8), (3, 7, 8)]),
    ("elu", "ELU(alpha=1.5)", None, [(3, 5)]),
    ("selu", "SELU()", None, [(3, 5)]),
    ("gelu", "GELU()", None, [(3, 5)]),
    ("gelu_tanh", "GELU(approximate='tanh')", None, [(3, 5)]),
    ("silu", "SiLU()", None, [(3, 5)]),
    ("mish", "Mish()", None, [(3, 5)]),
    ("leaky_relu", "LeakyReLU(negative_slope=0.2)", None, [(3, 5)]),
    ("relu6", "ReLU6()", None, [(3, 5)]),
    ("hardswish", "Hardswish()", None, [(30, 5)]),
    ("softplus", "Softplus()", None, [(3, 5)]),
    ("softmax", "Softmax(dim=1)", None, [(3, 5, 2)]),
    ("log_softmax", "LogSoftmax(dim=-1)", None, [(3, 5)]),
    ("mse", "MSELoss()", None, [(3, 5), (3, 5)]),
    ("l1", "L1Loss(reduction='sum')", None, [(3, 5), (3, 5)]),
    ("huber", "HuberLoss(delta=0.7)", None, [(3, 5), (3, 5)]),
    ("cross_entropy", "CrossEntropyLoss()", None, [(6, 5), ((6,), "i5")]),
    ("cross_entropy_smooth", "CrossEntropyLoss(label_smoothing=0.1, ignore_index=2)", None, [(9, 5), ((9,), "i5")]),
    ("bce", "BCEWithLogitsLoss()", None, [(3, 5), (3, 5)]),
    ("nll", "NLLLoss(ignore_index=1)", None, [(9, 5), ((9,), "i5")]),
    ("kl", "KLDivLoss(reduction='batchmean', log_target=True)", None, [(3, 5), (3, 5)]),
]

OPTIMIZERS = [
    ("sgd", "SGD(params, lr=0.05)", None),
    ("sgd_momentum", "SGD(params, lr=0.05, momentum=0.9, dampening=0.3, weight_decay=0.01)", None),
    ("sgd_nesterov", "SGD(params, lr=0.05, momentum=0.9, nesterov=True)", None),
    ("adagrad", "Adagrad(params, lr=0.1, lr_decay=0.01, weight_decay=0.01, initial_accumulator_value=0.1)",
     "AdaGrad(params, lr=0.1, lr_decay=0.01, weight_decay=0.01, initial_accumulator=0.1)"),
    ("rmsprop", "RMSprop(params, lr=0.01, weight_decay=0.01)", "RMSProp(params, lr=0.01, weight_decay=0.01)"),
    ("rmsprop_centered", "RMSprop(params, lr=0.01, momentum=0.5, centered=True)",
     "RMSProp(params, lr=0.01, momentum=0.5, centered=True)"),
    ("adam", "Adam(params, lr=0.02, weight_decay=0.01)", None),
    ("adam_amsgrad", "Adam(params, lr=0.02, betas=(0.8, 0.95), amsgrad=True)", None),
    ("adamw", "AdamW(params, lr=0.02, weight_decay=0.1)", None),
    ("adamw_groups", "AdamW([{'params': params[:1], 'lr': 0.1}, {'params': params[1:], 'weight_decay': 0.0}], lr=0.02)",
     None),
]

SCHEDULES = [
    # name, torch scheduler of an optimizer `o` with lr 0.1, our schedule
    ("step", "StepLR(o, 7, gamma=0.5)", "Step(0.1, 7, gamma=0.5)"),
    ("multi_step", "MultiStepLR(o, [5, 20], gamma=0.1)", "MultiStep(0.1, [5, 20], gamma=0.1)"),
    ("exponential", "ExponentialLR(o, 0.9)", "Exponential(0.1, 0.9)"),
    ("cosine", "CosineAnnealingLR(o, 50, eta_min=0.01)", "Cosine(0.1, 50, end=0.01)"),
    ("restarts", "CosineAnnealingWarmRestarts(o, 10, eta_min=0.01)", "Cosine(0.1, 10, end=0.01, restarts=True)"),
    ("polynomial", "PolynomialLR(o, 30, power=2.0)", "Polynomial(0.1, 30, power=2.0)"),
    ("warmup", "LinearLR(o, start_factor=0.25, total_iters=12)", "LinearWarmup(0.1, 12, start=0.25)"),
    ("cyclical", "CyclicLR(o, 0.01, 0.1, step_size_up=6, step_size_down=9, cycle_momentum=False)",
     "Cyclical(0.01, 0.1, 6, 9)"),
    ("one_cycle", "OneCycleLR(o, 0.1, total_steps=50, cycle_momentum=False)", "OneCycle(0.1, 50)"),
]
STEPS = 50


def gradient(values, step):
    """The gradient that the optimizers are fed: rough, of changing sign, the same for NumPy and torch."""
    return values * (1.0 + 0.5 * (-1) ** step) + (0.3 if step % 3 else -0.7)
