//! Facts about this machine: memory, processor, GPUs and their measured rates.
