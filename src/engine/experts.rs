//! Which experts of the mixtures that a GPU shares with the CPU lie on the GPU: the uses of every expert are counted as
//! the sides hand them over, and where the CPU has all of them, those that are used most take the places of those that
//! are used least. Decides and counts; moves nothing. Without exchanges this is a fixed share whose hits are counted.

use std::ops::Range;
use tandem_cpu::handoff::ELSEWHERE;
use tandem_cuda::experts::Exchange;

/// Tokens after which a use counts half. In a simulation of one layer (256 experts, 8 used, 64 slots, popularity by
/// Zipf's law) counts that fade so hit 67.7 % of uses, the least recently used order 58.8 %; where a quarter of the
/// ranks changes every 128 tokens, 54.1 % and 42.6 %. Half-lives of 64 and 1024 tokens: 66.8 % and 67.7 %, 55.7 % and
/// 50.8 %.
const HALF_LIFE: f64 = 256.0;
/// An expert comes if it is used so many times as often as the one that goes, and by so many uses more: with less,
/// three times as many exchanges bring the same hits.
const MARGIN: f64 = 1.5;
const EXTRA_USES: f64 = 2.0;
/// Bytes of experts that may come for each token that was computed: a prompt of 512 may exchange 2 GiB (40 ms at
/// 55 GB/s), a single token two experts of 2 MB, whose copies take little of what the CPU reads.
const BYTES_PER_TOKEN: u64 = 4 << 20;

/// Uses of the experts of the mixtures of a plan.
pub(super) struct Experts {
    layers: Vec<Layer>,
    /// What a use counts now: uses before count less.
    unit: f64,
    /// Bytes that may come.
    credit: u64,
    /// The layer that is looked at first.
    first: usize,
    uses: ExpertUses,
}

/// A mixture that a GPU and the CPU share.
pub(super) struct Layer {
    /// Index of the block in the model, of its GPU among those of the engine, and of the block on that GPU.
    block: usize,
    gpu: usize,
    local: usize,
    /// Bytes of an expert; `None`: they stay where they are.
    bytes: Option<u64>,
    /// Recent uses of every expert, in units.
    counts: Vec<f64>,
    /// The expert of each slot, and whether an expert has one.
    slots: Vec<usize>,
    is_here: Vec<bool>,
}

/// Uses of experts in steps of a token for each sequence, of mixtures of which a GPU and the CPU have experts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ExpertUses {
    /// How often `k` of the experts that a token used in a mixture were not on the GPU, for each `k` from 0 to all.
    by_misses: Vec<u64>,
}

impl ExpertUses {
    /// Notes the experts of a token, as the GPU hands them over.
    fn note(&mut self, ids: &[u32]) {
        let misses = ids.iter().filter(|id| **id & ELSEWHERE == 0).count();
        self.by_misses.resize(self.by_misses.len().max(ids.len() + 1), 0);
        self.by_misses[misses] += 1;
    }

    /// Uses since `before`.
    pub fn since(&self, before: &Self) -> Self {
        let before = before.by_misses.iter().chain(std::iter::repeat(&0));
        Self { by_misses: self.by_misses.iter().zip(before).map(|(now, before)| now - before).collect() }
    }

    /// The probability of each number of misses, from none to all experts of a token; `None` without any use.
    pub fn misses(&self) -> Option<Vec<f64>> {
        let all: u64 = self.by_misses.iter().sum();
        (all > 0).then(|| self.by_misses.iter().map(|n| *n as f64 / all as f64).collect())
    }

    /// Share of the uses that the GPU had; `None` without any.
    pub fn share(&self) -> Option<f64> {
        let misses = self.misses()?;
        let missed: f64 = misses.iter().enumerate().map(|(k, p)| k as f64 * p).sum();
        Some(1.0 - missed / (misses.len() - 1) as f64)
    }
}

impl Layer {
    /// Block `block`, number `local` of GPU number `gpu`, whose `held` experts of `n_experts` lie there first. `bytes`
    /// of an expert, if they may be exchanged.
    pub fn new(
        block: usize,
        gpu: usize,
        local: usize,
        n_experts: usize,
        held: Range<usize>,
        bytes: Option<u64>,
    ) -> Self {
        let is_here = (0..n_experts).map(|e| held.contains(&e)).collect();
        Self { block, gpu, local, bytes, counts: vec![0.0; n_experts], slots: held.collect(), is_here }
    }

    /// The exchange that is worth most, if any is, where a use counts `unit`.
    fn exchange(&mut self, unit: f64) -> Option<Exchange> {
        let counts = &self.counts;
        let by_count = |a: &usize, b: &usize| counts[*a].total_cmp(&counts[*b]);
        let new = (0..counts.len()).filter(|e| !self.is_here[*e]).max_by(by_count)?;
        let slot = (0..self.slots.len()).min_by(|a, b| by_count(&self.slots[*a], &self.slots[*b]))?;
        let old = self.slots[slot];
        if counts[new] <= MARGIN * counts[old] + EXTRA_USES * unit {
            return None;
        }
        (self.is_here[old], self.is_here[new], self.slots[slot]) = (false, true, new);
        Some(Exchange { block: self.local, slot, old, new })
    }
}

impl Experts {
    /// For the mixtures `layers`.
    pub fn new(layers: Vec<Layer>) -> Self {
        Self { layers, unit: 1.0, credit: 0, first: 0, uses: ExpertUses::default() }
    }

    /// Uses so far.
    pub fn uses(&self) -> &ExpertUses {
        &self.uses
    }

    /// Notes the choices of block `block` for a batch of `n_tokens` as the GPU hands them over: those that it has
    /// itself are marked with [`ELSEWHERE`].
    pub fn note(&mut self, block: usize, ids: &[u32], n_tokens: usize, is_decode: bool) {
        let use_counts = self.use_counts(n_tokens);
        let Some(layer) = self.layers.iter_mut().find(|l| l.block == block) else { return };
        let is_use = is_decode && !layer.slots.is_empty();
        for id in ids {
            if let Some(count) = layer.counts.get_mut((id & !ELSEWHERE) as usize) {
                *count += use_counts;
            }
        }
        if is_use {
            ids.chunks_exact(ids.len() / n_tokens).for_each(|ids| self.uses.note(ids));
        }
    }

    /// What a use in a batch of `n_tokens` counts: those of a long batch together as many as of [`HALF_LIFE`] tokens.
    fn use_counts(&self, n_tokens: usize) -> f64 {
        self.unit * (HALF_LIFE / n_tokens as f64).min(1.0)
    }

    /// Notes how often each expert of block `local` of GPU number `gpu` was chosen in a batch of `n_tokens` that was
    /// streamed there.
    pub fn note_counts(&mut self, gpu: usize, local: usize, uses: &[u32], n_tokens: usize) {
        let use_counts = self.use_counts(n_tokens);
        let Some(layer) = self.layers.iter_mut().find(|l| (l.gpu, l.local) == (gpu, local)) else { return };
        layer.counts.iter_mut().zip(uses).for_each(|(count, n)| *count += f64::from(*n) * use_counts);
    }

    /// After a batch of `n_tokens`: so many more bytes may come, and earlier uses count less.
    pub fn pass(&mut self, n_tokens: usize) {
        let bytes = n_tokens as u64 * BYTES_PER_TOKEN;
        let largest = self.layers.iter().filter_map(|l| l.bytes).max().unwrap_or(0);
        self.credit = (self.credit + bytes).min(bytes.max(largest));
        self.unit *= (n_tokens as f64 / HALF_LIFE).min(1.0).exp2();
        if self.unit > 1e100 {
            self.layers.iter_mut().flat_map(|l| &mut l.counts).for_each(|count| *count /= self.unit);
            self.unit = 1.0;
        }
    }

    /// The exchanges on GPU number `gpu` that are worth most, one a layer and then one more, as far as bytes may come.
    pub fn exchanges(&mut self, gpu: usize) -> Vec<Exchange> {
        let (mut all, n) = (Vec::new(), self.layers.len());
        loop {
            let before = all.len();
            for _ in 0..n {
                let at = self.first % n;
                let layer = &mut self.layers[at];
                let Some(bytes) = layer.bytes.filter(|_| layer.gpu == gpu) else {
                    self.first = at + 1;
                    continue;
                };
                if bytes > self.credit {
                    return all;
                }
                self.first = at + 1;
                if let Some(exchange) = layer.exchange(self.unit) {
                    self.credit -= bytes;
                    all.push(exchange);
                }
            }
            if all.len() == before {
                return all;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn two_layers(bytes: Option<u64>) -> Experts {
        Experts::new((0..2).map(|i| Layer::new(10 + i, 0, i, 8, 0..4, bytes)).collect())
    }

    /// What the prompt used most comes for what it used least, hottest first in every layer, each slot has one expert,
    /// and then nothing moves.
    #[test]
    fn hot_experts_come() {
        let mut experts = two_layers(Some(1 << 20));
        let ids: Vec<u32> = (0..20).flat_map(|_| [7, 6, 7, ELSEWHERE]).collect();
        experts.note(11, &ids, 20, false);
        experts.pass(20);
        let exchanges = experts.exchanges(0);
        let new: Vec<_> = exchanges.iter().map(|e| (e.block, e.new)).collect();
        assert_eq!(new, [(1, 7), (1, 6)]);
        assert!(exchanges.iter().all(|e| e.old != 0), "expert 0 is used");
        let mut slots = experts.layers[1].slots.clone();
        slots.sort();
        slots.dedup();
        assert_eq!(slots.len(), 4);
        assert!(slots.contains(&7) && slots.contains(&6) && slots.contains(&0));
        assert!(experts.exchanges(0).is_empty());
        assert_eq!(experts.uses().share(), None, "prompts are not counted");
    }

    /// Counts of a streamed prompt are uses like those that are handed over, however long it is.
    #[test]
    fn counts_of_streamed_prompts_are_uses() {
        for n_tokens in [64, 2048, 8192] {
            let mut experts = two_layers(Some(1 << 20));
            let of = |share: usize| (n_tokens / share) as u32;
            experts.note_counts(0, 1, &[of(8), 0, of(8), of(8), 0, 0, of(2), 0], n_tokens);
            experts.note_counts(1, 1, &[0, 0, 0, 0, of(1), 0, 0, 0], n_tokens); // of a GPU that is not there
            experts.pass(n_tokens);
            assert_eq!(experts.exchanges(0), [Exchange { block: 1, slot: 1, old: 1, new: 6 }], "{n_tokens}");
        }
    }

    /// No more bytes come than the tokens allow; an expert that is larger than a token's bytes comes after some tokens.
    #[test]
    fn bytes_are_bounded() {
        let mut experts = two_layers(Some(BYTES_PER_TOKEN * 3));
        let ids: Vec<u32> = (4..8).cycle().take(80).collect();
        experts.note(10, &ids, 20, true);
        let mut moved = 0;
        for _ in 0..9 {
            experts.pass(1);
            moved += experts.exchanges(0).len();
        }
        assert_eq!(moved, 3);
        assert_eq!(experts.uses().misses(), Some(vec![0.0, 0.0, 0.0, 0.0, 1.0]), "four experts a token");
    }

    /// Old uses fade: what is used now takes the place of what was used more, once.
    #[test]
    fn uses_fade() {
        let mut experts = two_layers(Some(1));
        experts.note(10, &[0; 100], 1, true);
        experts.note(10, &[1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3], 1, true);
        experts.pass(1);
        assert!(experts.exchanges(0).is_empty());
        for _ in 0..3000 {
            experts.note(10, &[1, 2, 3, 5], 1, true);
            experts.pass(1);
        }
        let exchanges = experts.exchanges(0);
        assert_eq!((exchanges.len(), exchanges[0].old, exchanges[0].new), (1, 0, 5));
        assert!(experts.unit.is_finite());
    }

    /// Shares that are fixed are counted, and stay.
    #[test]
    fn fixed_shares_stay() {
        let mut experts = two_layers(None);
        experts.note(10, &[7, 7, 7, 7, 7, 7, ELSEWHERE, ELSEWHERE | 1], 1, true);
        experts.pass(1);
        assert!(experts.exchanges(0).is_empty());
        assert_eq!(experts.uses().share(), Some(0.25));
        let before = experts.uses().clone();
        experts.note(10, &[7, 7, 7, 7, 7, 7, 7, 7], 1, true);
        experts.note(10, &[ELSEWHERE; 16], 2, true);
        let since = experts.uses().since(&before);
        assert_eq!(since.by_misses, [2, 0, 0, 0, 0, 0, 0, 0, 1]);
    }
}
