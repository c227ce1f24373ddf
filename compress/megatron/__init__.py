"""The second engine of distillation: Megatron-Core's models, pipeline and optimizer behind the same stage, the same
objectives and the same folders.

Nothing here imports megatron-core before a function of it is called; where it isn't installed, config says so.
"""
