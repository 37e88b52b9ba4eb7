//! tandem as a runner: one model, everything on the CPU, one sequence in slot 0.

use crate::Runner;
use anyhow::{Context as _, Result};
use std::path::Path;
use tandem::engine::{DeviceOptions, Engine, States};
use tandem::gguf::File;
use tandem::plan::Wishes;
use tandem_cpu::Isa;
use tandem_spec::Batch;

/// A loaded model and the states of one sequence.
pub struct Ours {
    engine: Engine,
    states: States,
    n_past: usize,
    isa: Isa,
}

impl Ours {
    /// Loads `path` with the defaults of `tandem run`: the best instruction set of this processor, and the plan's
    /// type of keys and values.
    pub fn open(path: &Path, n_ctx: usize, n_batch: usize, threads: usize) -> Result<Self> {
        let file = File::open(path)?;
        let model = tandem::model::describe(&file)?;
        let (n_ctx, n_batch, threads) = (Some(n_ctx), Some(n_batch), Some(threads));
        // No GPU may be used.
        let wishes = Wishes { vram: vec![0; 16], n_ctx, n_batch, threads, ..Default::default() };
        let plan = tandem::plan::plan(&model, &tandem::machine::here(&Default::default()), &wishes)?;
        let isa = Isa::detect();
        let options = DeviceOptions { isa, cuda_libs: None, cubin_cache: None };
        let engine = Engine::load(model, plan, &options, &file, &|_| {}).context("tandem cannot load the model")?;
        let states = engine.states()?;
        Ok(Self { engine, states, n_past: 0, isa })
    }

    /// Version and instruction set.
    pub fn build(&self) -> String {
        format!("kernels for {}, {:?} keys and values", self.isa.name(), self.engine.plan().kv_dtype)
    }
}

impl Runner for Ours {
    fn clear(&mut self) -> Result<()> {
        self.n_past = 0;
        Ok(())
    }

    fn feed(&mut self, tokens: &[u32], logits: &mut Vec<f32>) -> Result<()> {
        let mut n_left = tokens.len();
        for chunk in tokens.chunks(self.engine.plan().n_batch) {
            n_left -= chunk.len();
            let mut batch = Batch::single(0, self.n_past, chunk, false);
            if n_left > 0 {
                batch.wanted.clear();
            }
            let row = self.engine.step(&mut self.states, &batch)?;
            self.n_past += chunk.len();
            logits.clear();
            logits.extend_from_slice(row);
        }
        Ok(())
    }

    fn n_vocab(&self) -> usize {
        self.engine.model().n_vocab
    }
}
