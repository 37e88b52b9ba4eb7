//! A session: one timeline of tokens in one slot. It is given the whole prefix each time and works out what
//! is new. Keys and values can be cut at any position; GDN states cannot be rewound, so the session of a chat keeps
//! copies of them in main memory near the ends of prompts, as many as the plan counts, and a prefix that leaves the
//! timeline continues from the longest copy that it shares.

use super::step::Snapshot;
use super::{Engine, Error, ExpertUses, States, StepTrace};
use tandem_cuda::handoff::Times;
use tandem_spec::{Batch, SamplerOptions};

/// Tokens between the copy of a prompt and its end. Templates end a prompt with the beginning of the answer, which
/// they render differently, or not at all, once the answer is history.
const SNAPSHOT_TAIL: usize = 16;

/// One mutable timeline over an engine.
pub struct Session<'e> {
    engine: &'e Engine,
    states: States,
    slot: usize,
    tokens: Vec<u32>,
    snapshots: Vec<(usize, Snapshot)>, // by number of tokens, ascending
    n_snapshots: usize,                // at most
}

/// Number of leading tokens that two timelines share.
fn common_prefix(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(x, y)| x == y).count()
}

impl<'e> Session<'e> {
    /// An empty timeline in slot 0 of states of its own, for a text that only grows: it keeps no copies of GDN states.
    ///
    /// # Errors
    /// Too little memory.
    pub fn new(engine: &'e Engine) -> Result<Self, Error> {
        let (states, tokens, snapshots) = (engine.states()?, Vec::new(), Vec::new());
        Ok(Self { engine, states, slot: 0, tokens, snapshots, n_snapshots: 0 })
    }

    /// The same for a chat, whose next turn tells the last one a little differently: it keeps copies.
    ///
    /// # Errors
    /// Too little memory.
    pub fn for_chat(engine: &'e Engine) -> Result<Self, Error> {
        Ok(Self { n_snapshots: engine.plan().n_snapshots, ..Self::new(engine)? })
    }

    /// Tokens of the timeline so far.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Everything of the session that changes.
    pub fn states(&self) -> &States {
        &self.states
    }

    /// Bytes of the copies of states that it keeps now.
    pub fn snapshot_bytes(&self) -> u64 {
        (self.snapshots.len() * self.engine.snapshot_bytes(&self.states)) as u64
    }

    /// Positions of the timeline.
    pub fn n_ctx(&self) -> usize {
        self.engine.plan().n_ctx
    }

    /// Logits `[n_vocab]` after the last token that was fed; the sampler may change them in place.
    pub fn logits(&mut self) -> &mut [f32] {
        self.states.logits()
    }

    /// Continues the timeline to `prefix` (never empty) and returns how many of its tokens were computed: only
    /// what is new is, in batches of the plan's size; `stop` is asked between the batches of a prompt.
    ///
    /// # Errors
    /// [`Error::PromptTooLong`] before anything is computed; [`Error::Interrupted`]; a failed step.
    pub fn feed(&mut self, prefix: &[u32], stop: &dyn Fn() -> bool) -> Result<usize, Error> {
        assert!(!prefix.is_empty(), "a prefix has at least one token");
        let plan = self.engine.plan();
        if prefix.len() > plan.n_ctx {
            return Err(Error::PromptTooLong { tokens: prefix.len(), n_ctx: plan.n_ctx });
        }
        // The last token is always computed: its logits are what the caller wants.
        let shared = common_prefix(&self.tokens, &prefix[..prefix.len() - 1]);
        if shared < self.tokens.len() {
            self.rewind(shared)?;
        }
        let start = self.tokens.len();
        let is_prompt = prefix.len() - start > 1;
        let tail = prefix.len().saturating_sub(SNAPSHOT_TAIL);
        if is_prompt && tail > start && self.n_snapshots > 0 {
            self.advance(&prefix[start..tail], false, stop)?;
            self.keep_snapshot()?;
        }
        self.advance(&prefix[self.tokens.len()..], true, if is_prompt { stop } else { &|| false })?;
        Ok(prefix.len() - start)
    }

    /// Starts the step of the last token of `prefix`, which goes on where the timeline ends, and the choice of the
    /// token after it, on the device: [`Session::finish`] has it. False, and nothing done, where the host chooses: then
    /// [`Session::feed`] and the logits are the way.
    ///
    /// # Errors
    /// A device that failed.
    pub fn start(&mut self, prefix: &[u32], options: &SamplerOptions) -> Result<bool, Error> {
        let Some((last, known)) = prefix.split_last() else { return Ok(false) };
        if known != self.tokens || prefix.len() > self.n_ctx() {
            return Ok(false);
        }
        let started = self.engine.start(&mut self.states, self.slot, prefix, options);
        match started {
            Ok(true) => self.tokens.push(*last),
            Ok(false) => {}
            Err(_) => self.clear(),
        }
        started
    }

    /// The token that the step that was started has chosen.
    ///
    /// # Errors
    /// A device that failed; logits that no token can be chosen from.
    pub fn finish(&mut self) -> Result<u32, Error> {
        self.engine.finish(&mut self.states).inspect_err(|_| self.clear())
    }

    /// Seconds that GPUs were at work in the steps that were started, first to last kernel.
    ///
    /// # Errors
    /// What the device says.
    pub fn busy_seconds(&self) -> Result<f64, Error> {
        self.engine.busy_seconds(&self.states)
    }

    /// Uses of routed experts that a GPU shares with the CPU, in steps of single tokens of all sessions of the engine.
    pub fn expert_uses(&self) -> ExpertUses {
        self.engine.expert_uses()
    }

    /// The hand-overs between the GPU and the CPU workers in the last step.
    pub fn hand_overs(&self) -> Vec<Times> {
        self.engine.hand_overs(&self.states)
    }

    /// The last step that was started and finished: see [`Engine::trace`].
    ///
    /// # Errors
    /// What the device says.
    pub fn trace(&self, busy_before: f64) -> Result<Option<StepTrace>, Error> {
        self.engine.trace(&self.states, busy_before)
    }

    /// Computes `tokens`, which follow the timeline, in batches; the logits of the last one if they are `wanted`.
    fn advance(&mut self, tokens: &[u32], wanted: bool, stop: &dyn Fn() -> bool) -> Result<(), Error> {
        let end = self.tokens.len() + tokens.len();
        for chunk in tokens.chunks(self.engine.plan().n_batch) {
            if stop() {
                return Err(Error::Interrupted);
            }
            let mut batch = Batch::single(self.slot, self.tokens.len(), chunk, false);
            if !wanted || self.tokens.len() + chunk.len() < end {
                batch.wanted.clear();
            }
            if let Err(error) = self.engine.step(&mut self.states, &batch) {
                self.clear(); // some blocks may have taken the batch in, others not
                return Err(error);
            }
            self.tokens.extend_from_slice(chunk);
        }
        Ok(())
    }

    /// Forgets the timeline: the next batch is at position 0.
    pub fn clear(&mut self) {
        self.tokens.clear();
        self.snapshots.clear();
    }

    /// Cuts the timeline to at most `n_tokens` tokens: to exactly as many where no state is recurrent, else
    /// to the longest kept copy.
    fn rewind(&mut self, n_tokens: usize) -> Result<(), Error> {
        if !self.engine.model().is_hybrid() {
            self.tokens.truncate(n_tokens);
            return Ok(());
        }
        self.snapshots.retain(|(n, _)| *n <= n_tokens);
        match self.snapshots.last() {
            Some((n, snapshot)) => {
                self.tokens.truncate(*n);
                self.engine.restore(&mut self.states, self.slot, snapshot).inspect_err(|_| self.tokens.clear())
            }
            None => {
                self.tokens.clear(); // the next batch is at position 0
                Ok(())
            }
        }
    }

    fn keep_snapshot(&mut self) -> Result<(), Error> {
        let is_full = self.snapshots.len() >= self.n_snapshots;
        let old = is_full.then(|| self.snapshots.remove(0).1);
        let snapshot = self.engine.snapshot(&mut self.states, self.slot, old)?;
        self.snapshots.push((self.tokens.len(), snapshot));
        Ok(())
    }
}
