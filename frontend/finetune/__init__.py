"""Fine-tuning: what trains, how fast, on top of what, for how long.

    body = td.onnx.load("encoder.onnx")
    net = td.finetune.add_head(body, classes=3)
    print(td.finetune.recognise(body))                      # what the import assumed
    tuner = td.finetune.Tuner(net, (ids, mask, labels), evaluation=(...), stages=td.finetune.gradual(net))
    history = tuner.fit()
    td.onnx.save(net, "tuned.onnx")
"""

from .data import Arrays, Batches, Cursor
from .heads import Headed, add_head, replace_head
from .layers import Stage, gradual, layers, layerwise_lr
from .lora import LowRank, add_lora, load_lora, merge_lora, remove_lora, save_lora
from .metrics import METRICS, OBJECTIVES
from .names import aliases, bitfit, freeze, parameters, select, summary, train_only, unfreeze
from .recognise import Finding, Report, prepare, recognise
from .settings import Settings
from .tuner import History, Tuner
