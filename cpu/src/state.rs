//! What changes from step to step: keys and values, recurrent and convolution states by slot, and the scratch
//! of the largest batch. Owns the layout of that memory, which is one allocation and a few activation buffers; its
//! size is a pure function of the model and the limits. Refuses memory that cannot be had.

use crate::matrix::map_huge;
use crate::moe::{self, Routing};
use crate::projection::{MAX_PIECE_ROWS, MAX_RUN_ROWS};
use crate::{ActivationBuffer, Error, Forms, attention, delta_net};
use memmap2::MmapMut;
use std::ops::{Deref, DerefMut, Range};
use tandem_spec::{Block, KvDtype, Model, Rope, StateBytes, Weight};

/// Batches of so few rows are normed and rounded by every worker for itself, which is cheaper than a barrier.
pub(crate) const REDUNDANT_ROWS: usize = 2;

/// Limits that the memory of a [`State`] is made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StateSize {
    /// Sequences that can be in flight.
    pub n_slots: usize,
    /// Positions of a sequence.
    pub n_ctx: usize,
    /// Tokens of a batch, all sequences together.
    pub n_batch: usize,
    /// Type of keys and values.
    pub kv_dtype: KvDtype,
}

/// Where the state of a block lies.
#[derive(Clone, Copy, Debug)]
pub(crate) enum BlockState {
    None,
    /// Keys and values, each `[n_slots, n_kv_heads, n_ctx, head_dim]`, from these elements of the memory on, and
    /// the number of the rotary table.
    Kv {
        k: usize,
        v: usize,
        rope: usize,
    },
    /// Within the states of a slot: `[n_v_heads, S, S]` (rows are value elements) and `[conv_kernel - 1, n_channels]`.
    Delta {
        recurrent: usize,
        conv: usize,
    },
}

/// A buffer of activations: its elements and forms.
#[derive(Clone, Copy, Debug, Default)]
struct BufferSize {
    elements: usize,
    forms: Forms,
}

impl BufferSize {
    fn fit(&mut self, elements: usize, forms: Forms) {
        self.elements = self.elements.max(elements);
        self.forms = self.forms.or(forms);
    }

    fn n_bytes(self) -> usize {
        ActivationBuffer::n_bytes(self.elements, self.forms)
    }
}

/// Which part of the memory serves what. Offsets and lengths count f32 elements; parts begin at cache lines.
#[derive(Debug)]
pub(crate) struct Layout {
    pub size: StateSize,
    pub blocks: Vec<BlockState>,
    /// Distinct rotary embeddings, with the name of their divisors.
    pub ropes: Vec<(Rope, Option<String>)>,
    /// Elements of keys and values, all slots together.
    kv_len: usize,
    /// States of slot 0; those of the others follow.
    slot_states: usize,
    slot_len: usize,
    /// Rotary tables `[n_ropes, n_batch, rope_len]`: cosines, then sines.
    pub rope: usize,
    pub rope_len: usize,
    /// Projections of a mixer, or router logits: `[n_batch, wide_len]`.
    pub wide: usize,
    pub wide_len: usize,
    /// Hidden rows of feed-forward blocks: `[n_batch, n_ff]`, or those of experts, then of the shared expert.
    pub hidden: usize,
    /// Heads of a delta net `[n_batch, mixed_len]`.
    pub mixed: usize,
    pub mixed_len: usize,
    /// Parts of an attention: rows of `[n_heads, head_dim + 2]`.
    pub parts: usize,
    /// Rows that fit there, for blocks that have the widest rows.
    pub parts_rows: usize,
    /// Scratch of worker 0; that of the others follows.
    worker: usize,
    /// One row, then the tile.
    row_len: usize,
    tile_len: usize,
    n_workers: usize,
    len: usize,
    /// Normed rows.
    normed: BufferSize,
    /// Inputs of a mixer's output projection.
    mixed_acts: BufferSize,
    /// Normed rows in the order of experts.
    sorted: BufferSize,
    /// Hidden rows of feed-forward blocks.
    hidden_acts: BufferSize,
    /// Rows of one worker.
    own: BufferSize,
    /// (experts, expert choices of a batch) of the largest mixture.
    routing: (usize, usize),
}

fn forms(weights: &[&Weight]) -> Forms {
    weights.iter().fold(Forms::default(), |forms, w| forms.or(Forms::of(w.ty)))
}

impl Layout {
    /// Layout for the blocks `blocks` of `model`; `None` where its size overflows.
    pub fn new(model: &Model, blocks: &[usize], size: StateSize, n_workers: usize) -> Option<Self> {
        let StateSize { n_slots, n_ctx, n_batch, kv_dtype } = size;
        let mut len = 0usize;
        let mut take = |n: usize| {
            let start = len;
            len = len.checked_add(n.checked_next_multiple_of(16)?)?;
            Some(start)
        };
        let mut states = vec![BlockState::None; model.blocks.len()];
        let mut ropes: Vec<(Rope, Option<String>)> = Vec::new();
        let mut kv_len = 0;
        let (mut slot_len, mut rope_len, mut wide_len, mut mixed_len, mut parts_len) = (0usize, 0, 0, 0, 0);
        let (mut row_len, mut tile_len, mut parts_rows) =
            (model.n_embd, MAX_RUN_ROWS.max(n_batch * MAX_PIECE_ROWS), n_batch);
        let [mut normed, mut mixed_acts, mut sorted, mut hidden_acts, mut own] = [BufferSize::default(); 5];
        let (mut routing, mut hidden_len) = ((0, 0), 0);
        let batch = |width: usize| n_batch.checked_mul(width);
        let few = |width: usize| REDUNDANT_ROWS.min(n_batch) * width;
        for &index in blocks {
            match &model.blocks[index] {
                Block::Embed(_) => {}
                Block::Attention(b) => {
                    let s = &b.shape;
                    let rows = n_slots.checked_mul(n_ctx)?.checked_mul(s.n_kv_heads * s.head_dim)?;
                    let n = rows.checked_mul(kv_dtype.bytes())?.div_ceil(4);
                    let key = (s.rope.clone(), b.rope_freqs.as_ref().map(|w| w.name.clone()));
                    let rope = ropes.iter().position(|r| *r == key).unwrap_or(ropes.len());
                    if rope == ropes.len() {
                        ropes.push(key);
                    }
                    states[index] = BlockState::Kv { k: take(n)?, v: take(n)?, rope };
                    kv_len += 2 * n.next_multiple_of(16);
                    rope_len = rope_len.max(s.rope.n_rot);
                    wide_len = wide_len.max(b.attn_q.weight.n_rows() + 2 * s.n_kv_heads * s.head_dim);
                    let width = s.n_heads * s.head_dim;
                    row_len = row_len.max(width);
                    parts_rows = parts_rows.max(attention::parts_rows(s, n_batch, n_workers));
                    parts_len = parts_len.max(s.n_heads * (s.head_dim + 2));
                    tile_len = tile_len.max(attention::tile_len(s));
                    let input = forms(&[&b.attn_q.weight, &b.attn_k.weight, &b.attn_v.weight]);
                    let output = forms(&[&b.attn_output.weight]);
                    normed.fit(batch(s.n_embd)?, input);
                    mixed_acts.fit(batch(width)?, output);
                    own.fit(few(s.n_embd.max(width)), input.or(output));
                }
                Block::DeltaNet(b) => {
                    let s = &b.shape;
                    let part = |n: usize| n.checked_next_multiple_of(16);
                    let (recurrent, conv) = (part(s.recurrent_len())?, part(s.conv_len())?);
                    states[index] = BlockState::Delta { recurrent: slot_len, conv: slot_len + recurrent };
                    slot_len += recurrent + conv;
                    wide_len = wide_len.max(s.n_channels() + s.n_value() + 2 * s.n_v_heads);
                    mixed_len = mixed_len.max(s.n_value());
                    row_len = row_len.max(s.n_value());
                    tile_len = tile_len.max(delta_net::tile_len(s));
                    let qkvz = forms(&[&b.attn_qkv.weight, &b.attn_gate.weight]);
                    let input = qkvz.or(forms(&[&b.ssm_beta.weight, &b.ssm_alpha.weight]));
                    let output = forms(&[&b.ssm_out.weight]);
                    normed.fit(batch(s.n_embd)?, input);
                    mixed_acts.fit(batch(s.n_value())?, output);
                    own.fit(few(s.n_embd.max(s.n_value())), input.or(output));
                }
                Block::Ffn(b) => {
                    let input = forms(&[&b.ffn_gate.weight, &b.ffn_up.weight]);
                    normed.fit(batch(b.shape.n_embd)?, input);
                    own.fit(few(b.shape.n_embd), input);
                    let output = forms(&[&b.ffn_down.weight]);
                    hidden_acts.fit(batch(b.shape.n_ff)?, output);
                    own.fit(few(b.shape.n_ff), output);
                    row_len = row_len.max(b.shape.n_ff);
                    hidden_len = hidden_len.max(batch(b.shape.n_ff)?);
                }
                Block::Moe(b) => {
                    let s = &b.shape;
                    let experts = forms(&[&b.ffn_gate_exps.weight, &b.ffn_up_exps.weight]);
                    let mut input = experts.or(forms(&[&b.ffn_gate_inp]));
                    let mut output = forms(&[&b.ffn_down_exps.weight]);
                    if let Some(shared) = &b.shared {
                        input = input.or(forms(&[&shared.ffn_gate_shexp.weight, &shared.ffn_up_shexp.weight]));
                        input = input.or(shared.ffn_gate_inp_shexp.as_ref().map_or(Forms::default(), |w| forms(&[w])));
                        output = output.or(forms(&[&shared.ffn_down_shexp.weight]));
                    }
                    wide_len = wide_len.max(s.n_experts + 1);
                    normed.fit(batch(s.n_embd)?, input);
                    own.fit(few(s.n_embd), input);
                    sorted.fit(batch(s.n_embd * s.n_used)?, experts);
                    let all = |n_tokens: usize| moe::shared_start(s, n_tokens) + n_tokens * s.n_ff_shared;
                    batch(s.n_ff * s.n_used + s.n_ff_shared)?;
                    hidden_acts.fit(all(n_batch), output);
                    own.fit(all(1), output);
                    hidden_len = hidden_len.max(all(n_batch));
                    routing = (routing.0.max(s.n_experts), routing.1.max(n_batch * s.n_used));
                }
                Block::Head(b) => {
                    let input = forms(&[&b.output.weight]);
                    normed.fit(batch(b.shape.n_embd)?, input);
                    own.fit(few(b.shape.n_embd), input);
                }
            }
        }
        let align = |n: usize| n.next_multiple_of(16);
        let (row_len, tile_len) = (align(row_len), align(tile_len));
        Some(Self {
            size,
            blocks: states,
            rope: take(batch(rope_len * ropes.len())?)?,
            ropes,
            kv_len,
            slot_states: take(slot_len.checked_mul(n_slots)?)?,
            slot_len,
            rope_len,
            wide: take(batch(wide_len)?)?,
            wide_len,
            hidden: take(hidden_len)?,
            mixed: take(batch(mixed_len)?)?,
            mixed_len,
            parts: take(parts_rows.checked_mul(parts_len)?)?,
            parts_rows,
            worker: take((row_len + tile_len).checked_mul(n_workers)?)?,
            row_len,
            tile_len,
            n_workers,
            len,
            normed,
            mixed_acts,
            sorted,
            hidden_acts,
            own,
            routing,
        })
    }

    /// Bytes of everything that a state with this layout allocates.
    pub fn n_bytes(&self) -> usize {
        let shared = [self.normed, self.mixed_acts, self.sorted, self.hidden_acts];
        let per_worker = self.own.n_bytes() + Routing::n_bytes(self.routing.0, self.routing.1);
        4 * self.len + shared.iter().map(|b| b.n_bytes()).sum::<usize>() + self.n_workers * per_worker
    }

    /// The same by use.
    pub fn bytes(&self) -> StateBytes {
        let (kv, states) = (4 * self.kv_len, 4 * self.slot_len * self.size.n_slots);
        let scratch = (self.n_bytes() - kv - states) as u64;
        StateBytes { kv: kv as u64, states: states as u64, logits: 0, scratch }
    }

    /// States of `slot`.
    pub fn slot(&self, slot: usize) -> Range<usize> {
        assert!(slot < self.size.n_slots, "slot {slot} of {}", self.size.n_slots);
        let start = self.slot_states + slot * self.slot_len;
        start..start + self.slot_len
    }

    /// Scratch row of a worker.
    pub fn worker_row(&self, worker: usize) -> Range<usize> {
        let start = self.worker + worker * (self.row_len + self.tile_len);
        start..start + self.row_len
    }

    /// Scratch tile of a worker.
    pub fn worker_tile(&self, worker: usize) -> Range<usize> {
        let start = self.worker_row(worker).end;
        start..start + self.tile_len
    }
}

/// f32 in memory of their own, zero until written, in huge pages where the system has them. They begin at a page, so
/// that cache lines and vectors do not straddle.
pub struct Floats {
    memory: MmapMut,
    len: usize,
}

impl Floats {
    /// Room for `capacity` f32, none of them used.
    ///
    /// # Errors
    /// The memory is not there ([`Error::Memory`]).
    pub fn with_capacity(capacity: usize) -> Result<Self, Error> {
        let bytes = capacity.checked_mul(4).ok_or(Error::Memory { bytes: usize::MAX })?;
        Ok(Self { memory: map_huge(bytes).map_err(|_| Error::Memory { bytes })?, len: 0 })
    }

    /// f32 that there is room for.
    pub fn capacity(&self) -> usize {
        self.memory.len() / 4
    }

    /// Uses the first `len`, which keep what was written to them before.
    ///
    /// # Panics
    /// If there is no room for them.
    pub fn set_len(&mut self, len: usize) {
        assert!(len <= self.capacity(), "{len} of {} f32", self.capacity());
        self.len = len;
    }
}

impl Deref for Floats {
    type Target = [f32];
    fn deref(&self) -> &[f32] {
        // SAFETY: the mapping begins at a page and has room for `len` f32; all bits are valid f32.
        unsafe { std::slice::from_raw_parts(self.memory.as_ptr().cast(), self.len) }
    }
}

impl DerefMut for Floats {
    fn deref_mut(&mut self) -> &mut [f32] {
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts_mut(self.memory.as_mut_ptr().cast(), self.len) }
    }
}

/// Activation buffers and routing tables.
pub(crate) struct Buffers {
    pub normed: ActivationBuffer,
    pub mixed: ActivationBuffer,
    pub sorted: ActivationBuffer,
    pub hidden: ActivationBuffer,
    /// One a worker.
    pub own: Vec<ActivationBuffer>,
}

/// Keys, values, recurrent states and scratch for up to [`StateSize::n_slots`] sequences.
pub struct State {
    pub(crate) layout: Layout,
    /// `[layout.len]`.
    memory: Floats,
    pub(crate) buffers: Buffers,
    /// One a worker.
    pub(crate) routing: Vec<Routing>,
}

/// A copy of the recurrent states of one slot (not of its keys and values, which later tokens do not change).
#[derive(Clone, Debug)]
pub struct Snapshot(Box<[f32]>);

impl Snapshot {
    /// Bytes that it holds.
    pub fn n_bytes(&self) -> usize {
        size_of_val(&*self.0)
    }
}

impl State {
    pub(crate) fn new(layout: Layout) -> Result<Self, Error> {
        let bytes = layout.n_bytes();
        let failed = || Error::Memory { bytes };
        let mut memory = Floats::with_capacity(layout.len).map_err(|_| failed())?;
        memory.set_len(layout.len);
        let buffer = |b: BufferSize| ActivationBuffer::new(b.elements, b.forms).map_err(|_| failed());
        let buffers = Buffers {
            normed: buffer(layout.normed)?,
            mixed: buffer(layout.mixed_acts)?,
            sorted: buffer(layout.sorted)?,
            hidden: buffer(layout.hidden_acts)?,
            own: (0..layout.n_workers).map(|_| buffer(layout.own)).collect::<Result<_, _>>()?,
        };
        let (n_experts, n_choices) = layout.routing;
        let routing = (0..layout.n_workers)
            .map(|_| Routing::new(n_experts, n_choices).map_err(|_| failed()))
            .collect::<Result<_, _>>()?;
        Ok(Self { layout, memory, buffers, routing })
    }

    /// Limits it was made for.
    pub fn size(&self) -> StateSize {
        self.layout.size
    }

    /// Bytes allocated.
    pub fn bytes(&self) -> StateBytes {
        let routing = self.routing.iter().map(Routing::allocated).sum::<usize>();
        let own = self.buffers.own.iter().map(ActivationBuffer::allocated).sum::<usize>();
        let Buffers { normed, mixed, sorted, hidden, .. } = &self.buffers;
        let shared = [normed, mixed, sorted, hidden].map(ActivationBuffer::allocated).iter().sum::<usize>();
        let all = size_of_val(&*self.memory) + shared + own + routing;
        let StateBytes { kv, states, logits, .. } = self.layout.bytes();
        StateBytes { scratch: all as u64 - kv - states - logits, kv, states, logits }
    }

    /// The memory of the layout, and what lies beside it.
    pub(crate) fn split(&mut self) -> (&Layout, &mut [f32], &Buffers, &mut [Routing]) {
        (&self.layout, &mut self.memory, &self.buffers, &mut self.routing)
    }

    /// Begins a new sequence in `slot`: its recurrent states become zero.
    pub fn reset_slot(&mut self, slot: usize) {
        let (layout, memory, ..) = self.split();
        memory[layout.slot(slot)].fill(0.0);
    }

    /// Bytes of a snapshot.
    pub fn snapshot_bytes(&self) -> usize {
        4 * self.layout.slot_len
    }

    /// Copies the recurrent states of `slot`, which belong to the position that the slot has reached.
    pub fn snapshot(&mut self, slot: usize) -> Snapshot {
        let (layout, memory, ..) = self.split();
        Snapshot(memory[layout.slot(slot)].into())
    }

    /// Puts `slot` back to the position at which `snapshot` was taken, from the same slot: what it holds for that
    /// position on is overwritten as the sequence goes on.
    pub fn restore(&mut self, slot: usize, snapshot: &Snapshot) {
        let (layout, memory, ..) = self.split();
        memory[layout.slot(slot)].copy_from_slice(&snapshot.0);
    }
}
