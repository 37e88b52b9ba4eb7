//! One step: the blocks of the model, in order, each on the device where the plan put it.

use super::Error;
use crate::plan::{Device, Plan};
use std::ops::Range;
use tandem_cpu::{Snapshot, StateSize};
use tandem_spec::{Batch, Model, TensorSource};

/// A loaded model: the plan and, per device, the weights of its blocks.
pub struct Engine {
    model: Model,
    plan: Plan,
    cpu: tandem_cpu::Backend,
    segments: Vec<(Device, Range<usize>)>,
}

/// Everything that changes while an engine runs: KV rows and GDN states by slot, and the buffers of a step.
pub struct States {
    cpu: tandem_cpu::State,
    x: Vec<f32>,      // [n_batch, n_embd] residual stream
    logits: Vec<f32>, // [wanted, n_vocab]
}

/// The longest runs of consecutive blocks that run wholly on one device.
fn segments(plan: &Plan) -> Vec<(Device, Range<usize>)> {
    let mut runs: Vec<(Device, Range<usize>)> = Vec::new();
    for block in 0..plan.places.len() {
        let device = plan.device(block).expect("shared blocks are refused when the plan is loaded");
        match runs.last_mut() {
            Some((last, range)) if *last == device => range.end = block + 1,
            _ => runs.push((device, block..block + 1)),
        }
    }
    runs
}

impl Engine {
    /// Loads the weights of every block onto its device. `progress` is told the bytes done so far, of
    /// [`Engine::planned_bytes`] in all; it is called from several threads.
    ///
    /// # Errors
    /// Too little memory, or a weight that a backend cannot multiply with.
    pub fn load(
        model: Model,
        plan: Plan,
        isa: tandem_cpu::Isa,
        source: &dyn TensorSource,
        progress: &(dyn Fn(u64) + Sync),
    ) -> Result<Self, Error> {
        assert_eq!(plan.places.len(), model.blocks.len(), "a plan places every block of its model once");
        if let Some(device) = plan.devices().into_iter().find(|d| *d != Device::Cpu) {
            return Err(Error::Device(device));
        }
        let on_cpu: Vec<usize> = (0..plan.places.len()).collect();
        let options = tandem_cpu::Options { threads: plan.threads, isa };
        let cpu = tandem_cpu::Backend::load(&model, &on_cpu, source, options, progress)?;
        let segments = segments(&plan);
        Ok(Self { model, plan, cpu, segments })
    }

    /// The model's description.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// The plan that was loaded.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// Bytes of weights in host memory.
    pub fn weight_bytes(&self) -> u64 {
        self.cpu.weight_bytes()
    }

    /// Fresh states for the plan's slots.
    ///
    /// # Errors
    /// Too little memory.
    pub fn states(&self) -> Result<States, Error> {
        let plan = &self.plan;
        Ok(States {
            cpu: self.cpu.state(StateSize {
                n_slots: plan.n_slots,
                n_ctx: plan.n_ctx,
                n_batch: plan.n_batch,
                kv_dtype: plan.kv_dtype,
            })?,
            x: vec![0.0; plan.n_batch * self.model.n_embd],
            logits: Vec::new(),
        })
    }

    /// Runs one batch through the model and returns the logits of its wanted rows `[wanted, n_vocab]`.
    ///
    /// # Errors
    /// A batch that does not fit ([`Error::Batch`]); a backend that failed.
    pub fn step<'s>(&self, states: &'s mut States, batch: &Batch) -> Result<&'s [f32], Error> {
        batch.check(self.plan.n_slots, self.plan.n_ctx, self.model.n_vocab).map_err(Error::Batch)?;
        assert!(batch.tokens.len() <= self.plan.n_batch, "a batch larger than the plan's largest");
        let x = &mut states.x[..batch.tokens.len() * self.model.n_embd];
        states.logits.resize(batch.wanted.len() * self.model.n_vocab, 0.0);
        let logits = &mut states.logits[..];
        for (device, blocks) in &self.segments {
            match device {
                Device::Cpu => self.cpu.run(blocks.clone(), batch, &mut states.cpu, x, logits)?,
                Device::Cuda(i) => unreachable!("a plan for cuda{i} is refused when it is loaded"),
            }
        }
        Ok(logits)
    }
}

impl States {
    /// Forgets what `slot` has seen.
    pub fn reset(&mut self, slot: usize) {
        self.cpu.reset_slot(slot);
    }

    /// A copy of the recurrent states of `slot`.
    pub fn snapshot(&mut self, slot: usize) -> Snapshot {
        self.cpu.snapshot(slot)
    }

    /// Bytes of such a copy; 0 for models without recurrent states.
    pub fn snapshot_bytes(&self) -> usize {
        self.cpu.snapshot_bytes()
    }

    /// Puts a copy of `slot`'s recurrent states back.
    pub fn restore(&mut self, slot: usize, snapshot: &Snapshot) {
        self.cpu.restore(slot, snapshot);
    }

    /// Logits of the last step `[wanted, n_vocab]`.
    pub fn logits(&mut self) -> &mut [f32] {
        &mut self.logits
    }
}
