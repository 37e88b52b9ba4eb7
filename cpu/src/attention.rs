//! `Attention`: q, k and v rows are one space of projections; one barrier; norms, rotation and the append to the
//! cache; one barrier; then online-softmax attention (Milakov and Gimelshein 2018; Dao et al. 2022) over pieces: a KV
//! head with all its query heads, a few tokens of one sequence, and a range of keys. One barrier; the output
//! projection's input is put together from the ranges, gated and rounded.

use crate::gemm::{Element, add_product, product_transposed, stream_add_product, stream_product_transposed};
use crate::norm::{add_scaled, rms_norm, rms_norm_in_place, scale, sigmoid_mul};
use crate::pool::Worker;
use crate::projection::{Projection, for_each_run, read_ahead, vector};
use crate::simd::{self, Kernel, Simd, exp};
use crate::state::BlockState;
use crate::step::Step;
use crate::{Error, Isa};
use std::ops::Range;
use tandem_spec::{Attention, AttentionShape, KvDtype, RopeStyle, Sequence, TensorSource, Weight};

/// Keys that are scored at a time.
const KEYS: usize = 64;
/// Query rows (tokens x heads of a group) that share keys, about.
const QUERIES: usize = 64;
/// Query rows up to which keys and values are read in place, once and in order; more are worth a converted tile.
const QUERIES_IN_PLACE: usize = 8;
/// Fewest keys of a range.
const MIN_RANGE: usize = 256;

/// Tokens of a piece.
fn tile_tokens(shape: &AttentionShape) -> usize {
    (QUERIES / (shape.n_heads / shape.n_kv_heads)).max(1)
}

/// Elements of a worker's tile: queries, accumulators, scores, one tile of keys or values, and maximum and sum of
/// each row.
pub(crate) fn tile_len(shape: &AttentionShape) -> usize {
    let rows = tile_tokens(shape) * (shape.n_heads / shape.n_kv_heads);
    rows * (2 * shape.head_dim + KEYS + 2) + KEYS * shape.head_dim
}

/// Rows of partial results: as many as [`AttentionBlock::n_ranges`] times the tokens of a step can be.
pub(crate) fn parts_rows(shape: &AttentionShape, n_batch: usize, n_workers: usize) -> usize {
    n_batch + 2 * n_workers * tile_tokens(shape).min(n_batch).div_ceil(shape.n_kv_heads)
}

/// An attention block.
pub(crate) struct AttentionBlock {
    shape: AttentionShape,
    /// `[n_embd]`.
    attn_norm: Box<[f32]>,
    /// `[n_heads * head_dim, n_embd]`; gated: per head query rows, then gate rows.
    attn_q: Projection,
    /// `[n_kv_heads * head_dim, n_embd]`.
    attn_k: Projection,
    /// `[n_kv_heads * head_dim, n_embd]`.
    attn_v: Projection,
    /// `[head_dim]`.
    attn_q_norm: Option<Box<[f32]>>,
    /// `[head_dim]`.
    attn_k_norm: Option<Box<[f32]>>,
    /// `[n_embd, n_heads * head_dim]`.
    attn_output: Projection,
    /// Angle per position of each pair `[n_rot / 2]`, and the factor on cosines and sines.
    frequencies: (Vec<f64>, f64),
}

impl AttentionBlock {
    /// Packs the weights of `block`.
    pub fn load(block: &Attention<Weight>, source: &dyn TensorSource, isa: Isa) -> Result<Self, Error> {
        let optional = |w: &Option<Weight>| w.as_ref().map(|w| vector(w, source));
        let divisors = optional(&block.rope_freqs);
        Ok(Self {
            shape: block.shape.clone(),
            attn_norm: vector(&block.attn_norm, source),
            attn_q: Projection::load(&block.attn_q, source, isa)?,
            attn_k: Projection::load(&block.attn_k, source, isa)?,
            attn_v: Projection::load(&block.attn_v, source, isa)?,
            attn_q_norm: optional(&block.attn_q_norm),
            attn_k_norm: optional(&block.attn_k_norm),
            attn_output: Projection::load(&block.attn_output, source, isa)?,
            frequencies: block.shape.rope.frequencies(divisors.as_deref()),
        })
    }

    /// Bytes of the weights.
    pub fn n_bytes(&self) -> usize {
        let norms = [Some(&self.attn_norm), self.attn_q_norm.as_ref(), self.attn_k_norm.as_ref()];
        self.projections().map(|p| p.n_bytes()).sum::<usize>()
            + norms.into_iter().flatten().map(|n| size_of_val(&**n)).sum::<usize>()
    }

    /// Queries, keys, values and output.
    pub fn projections(&self) -> impl Iterator<Item = &Projection> {
        self.inputs().into_iter().chain([&self.attn_output])
    }

    fn group(&self) -> usize {
        self.shape.n_heads / self.shape.n_kv_heads
    }

    /// Columns of query head `head` in the wide scratch, and of its gate.
    fn query(&self, head: usize) -> (Range<usize>, Range<usize>) {
        let d = self.shape.head_dim;
        let start = if self.shape.gated { 2 * head * d } else { head * d };
        (start..start + d, start + d..start + 2 * d)
    }

    /// Writes the rotary table of number `rope` for this worker's share of the tokens. The table is complete after
    /// the next barrier.
    pub fn fill_rope(&self, w: &Worker, step: &Step, rope: usize) {
        let (frequencies, magnitude) = &self.frequencies;
        let mine = w.share(step.n_tokens);
        for (first, sequence) in step.sequences() {
            for token in mine.start.max(first)..mine.end.min(first + sequence.n_tokens) {
                let position = (sequence.position + token - first) as f64;
                // SAFETY: rows of this worker's share.
                let row = unsafe { step.memory.write(step.rope(rope, token, self.shape.rope.n_rot)) };
                let (cos, sin) = row.split_at_mut(frequencies.len());
                for (f, (cos, sin)) in frequencies.iter().zip(cos.iter_mut().zip(sin)) {
                    let (s, c) = (position * f).sin_cos();
                    (*cos, *sin) = ((c * magnitude) as f32, (s * magnitude) as f32);
                }
            }
        }
    }

    /// Pieces of a step before keys are cut into ranges, and the number of ranges.
    fn n_ranges(&self, w: &Worker, step: &Step) -> (usize, usize) {
        let tiles = step.batch.sequences.iter().map(|s| s.n_tokens.div_ceil(tile_tokens(&self.shape)));
        let pieces = tiles.sum::<usize>() * self.shape.n_kv_heads;
        let longest = step.batch.sequences.iter().map(|s| s.position + s.n_tokens).max().unwrap_or(1);
        (pieces, (2 * w.n_workers()).div_ceil(pieces).min(longest.div_ceil(MIN_RANGE)))
    }

    /// What the first stage multiplies with, in the order of the wide scratch.
    pub fn inputs(&self) -> [&Projection; 3] {
        [&self.attn_q, &self.attn_k, &self.attn_v]
    }

    /// Adds the block to the residual stream.
    pub fn run(&self, w: &Worker, step: &Step, state: BlockState) {
        let BlockState::Kv { k, v, rope } = state else { panic!("an attention without keys and values") };
        let (isa, d, n_heads) = (step.isa, self.shape.head_dim, self.shape.n_heads);
        let projections = self.inputs();
        let forms = projections.iter().map(|p| p.forms()).reduce(|a, b| a.or(b)).expect("three projections");
        let h = step.prepare(w, &step.buffers.normed, step.n_tokens, step.n_embd, forms, |i, row| {
            // SAFETY: nobody writes the residual stream in this stage.
            let x = unsafe { step.x.read(step.row(i, 0..step.n_embd)) };
            rms_norm(isa, x, &self.attn_norm, self.shape.rms_eps, row);
            row
        });
        for_each_run(w, step.n_tokens, &projections, |index, rows| {
            let first: usize = projections[..index].iter().map(|p| p.n_out()).sum();
            let cols = first + rows.start..first + rows.end;
            let out = step.memory.ptr(step.wide(0, cols.clone()).start..step.wide(step.n_tokens - 1, cols).end);
            // SAFETY: these rows of the projection are this worker's, in every token.
            unsafe { projections[index].apply(isa, rows, &h, out, step.layout.wide_len) };
        });
        w.barrier();

        let per_token = n_heads + 2 * self.shape.n_kv_heads;
        let mine = w.share(step.n_tokens * per_token);
        for (first, sequence) in step.sequences() {
            let range = first * per_token..(first + sequence.n_tokens) * per_token;
            for i in mine.start.max(range.start)..mine.end.min(range.end) {
                self.place(step, (k, v, rope), sequence, first, i / per_token, i % per_token);
            }
        }
        w.barrier();

        let (n_pieces, n_ranges) = self.n_ranges(w, step);
        for piece in w.pieces(n_pieces * n_ranges) {
            let (mut piece, range) = (piece / n_ranges, piece % n_ranges);
            for (first, sequence) in step.sequences() {
                let n = sequence.n_tokens.div_ceil(tile_tokens(&self.shape)) * self.shape.n_kv_heads;
                if piece < n {
                    self.attend(w, step, (k, v), sequence, first, piece, (range, n_ranges));
                    break;
                }
                piece -= n;
            }
        }
        step.barrier_reading(w, |ahead| read_ahead(w, &[&self.attn_output], ahead));

        let o = step.prepare(w, &step.buffers.mixed, step.n_tokens, n_heads * d, self.attn_output.forms(), |i, row| {
            for (head, o) in row.chunks_exact_mut(d).enumerate() {
                // SAFETY: nobody writes the parts or the wide scratch in this stage.
                let part = |range: usize| unsafe { step.memory.read(self.part(step, range, i, head)) };
                let max = (0..n_ranges).map(|r| part(r)[d]).fold(f32::NEG_INFINITY, f32::max);
                let weight = |r: usize| (part(r)[d] - max).exp();
                let sum: f32 = (0..n_ranges).map(|r| weight(r) * part(r)[d + 1]).sum();
                scale(isa, &part(0)[..d], weight(0) / sum, None, o);
                for r in 1..n_ranges {
                    add_scaled(isa, o, weight(r) / sum, &part(r)[..d]);
                }
                if self.shape.gated {
                    // SAFETY: as above.
                    sigmoid_mul(isa, o, unsafe { step.memory.read(step.wide(i, self.query(head).1)) });
                }
            }
            row
        });
        step.add(w, &self.attn_output, &o);
    }

    /// Partial result of `head` of `token` over key range `range`: `head_dim` sums, the maximum, the sum of weights.
    fn part(&self, step: &Step, range: usize, token: usize, head: usize) -> Range<usize> {
        let (row, len) = (range * step.n_tokens + token, self.shape.head_dim + 2);
        assert!(row < step.layout.parts_rows);
        let start = step.layout.parts + (row * self.shape.n_heads + head) * len;
        start..start + len
    }

    /// Elements of the cache (`k` or `v` at `start`) of `n` positions of a KV head, as f32 elements of the memory
    /// (half as many for bf16), and the byte within the first one.
    fn cache<T>(&self, step: &Step, start: usize, slot: usize, head: usize, positions: Range<usize>) -> *mut T {
        let (size, d) = (step.layout.size, self.shape.head_dim);
        assert!(slot < size.n_slots && head < self.shape.n_kv_heads && positions.end <= size.n_ctx);
        assert_eq!(size_of::<T>(), size.kv_dtype.bytes());
        let bytes = size_of::<T>() * size.n_slots * self.shape.n_kv_heads * size.n_ctx * d;
        let all = step.memory.ptr(start..start + bytes.div_ceil(4)).cast::<T>();
        // SAFETY: slot, head and position lie within the cache.
        unsafe { all.add(((slot * self.shape.n_kv_heads + head) * size.n_ctx + positions.start) * d) }
    }

    /// Norm and rotation of one head of a token, in place for a query, into the cache for a key; a value goes
    /// there as it is. `head` counts query heads, then keys, then values.
    fn place(
        &self,
        step: &Step,
        (k, v, rope): (usize, usize, usize),
        sequence: &Sequence,
        first: usize,
        token: usize,
        head: usize,
    ) {
        let (d, n_heads, n_kv_heads) = (self.shape.head_dim, self.shape.n_heads, self.shape.n_kv_heads);
        let cols = match head.checked_sub(n_heads) {
            None => self.query(head).0,
            Some(i) => self.attn_q.n_out() + i * d..self.attn_q.n_out() + (i + 1) * d,
        };
        // SAFETY: this head of this token is this worker's share.
        let x = unsafe { step.memory.write(step.wide(token, cols)) };
        if head < n_heads + n_kv_heads {
            let norm = if head < n_heads { &self.attn_q_norm } else { &self.attn_k_norm };
            if let Some(weight) = norm {
                rms_norm_in_place(step.isa, x, weight, self.shape.rms_eps);
            }
            // SAFETY: the table was completed before the last barrier.
            let table = unsafe { step.memory.read(step.rope(rope, token, self.shape.rope.n_rot)) };
            rotate(self.shape.rope.style, table, x);
        }
        if let Some(i) = head.checked_sub(n_heads) {
            let (start, kv_head) = if i < n_kv_heads { (k, i) } else { (v, i - n_kv_heads) };
            let position = sequence.position + token - first;
            let at = position..position + 1;
            match step.layout.size.kv_dtype {
                KvDtype::F32 => {
                    let to = self.cache::<f32>(step, start, sequence.slot, kv_head, at);
                    // SAFETY: this row of the cache is this worker's share.
                    unsafe { std::slice::from_raw_parts_mut(to, d) }.copy_from_slice(x);
                }
                KvDtype::Bf16 => {
                    let to = self.cache::<u16>(step, start, sequence.slot, kv_head, at);
                    // SAFETY: as above.
                    let to = unsafe { std::slice::from_raw_parts_mut(to, d) };
                    to.iter_mut().zip(&*x).for_each(|(to, x)| *to = half::bf16::from_f32(*x).to_bits());
                }
            }
        }
    }

    /// One piece: tokens of tile `piece / n_kv_heads`, KV head `piece % n_kv_heads`, keys of range `range` of
    /// `n_ranges`.
    fn attend(
        &self,
        w: &Worker,
        step: &Step,
        (k, v): (usize, usize),
        sequence: &Sequence,
        first: usize,
        piece: usize,
        (range, n_ranges): (usize, usize),
    ) {
        let (d, group, n_kv_heads) = (self.shape.head_dim, self.group(), self.shape.n_kv_heads);
        // Later tiles see more keys: they come first, so that short pieces fill the end.
        let n_tiles = sequence.n_tokens.div_ceil(tile_tokens(&self.shape));
        let (tile, kv_head) = (n_tiles - 1 - piece / n_kv_heads, piece % n_kv_heads);
        let start = tile * tile_tokens(&self.shape);
        let n_tokens = tile_tokens(&self.shape).min(sequence.n_tokens - start);
        let n_rows = n_tokens * group;
        let n_keys = sequence.position + start + n_tokens;
        let per_range = n_keys.div_ceil(n_ranges).next_multiple_of(KEYS);
        let keys = (range * per_range).min(n_keys)..((range + 1) * per_range).min(n_keys);

        let scratch = step.tile(w);
        let (queries, scratch) = scratch.split_at_mut(n_rows * d);
        let (sums, scratch) = scratch.split_at_mut(n_rows * d);
        let (scores, scratch) = scratch.split_at_mut(n_rows * KEYS);
        let (converted, scratch) = scratch.split_at_mut(KEYS * d);
        let (max, weight) = scratch[..2 * n_rows].split_at_mut(n_rows);
        for (row, q) in queries.chunks_exact_mut(d).enumerate() {
            let (token, head) = (first + start + row / group, kv_head * group + row % group);
            // SAFETY: nobody writes the wide scratch in this stage.
            let x = unsafe { step.memory.read(step.wide(token, self.query(head).0)) };
            scale(step.isa, x, 1.0 / (d as f32).sqrt(), None, q);
        }
        sums.fill(0.0);
        max.fill(f32::NEG_INFINITY);
        weight.fill(0.0);
        let (all, first_visible) = (0..n_keys, sequence.position + start + 1);
        macro_rules! attend {
            ($T:ty) => {
                simd::run(
                    step.isa,
                    d,
                    Attend::<$T> {
                        d,
                        group,
                        first_visible,
                        keys,
                        k: self.cache(step, k, sequence.slot, kv_head, all.clone()),
                        v: self.cache(step, v, sequence.slot, kv_head, all),
                        queries,
                        sums,
                        scores,
                        converted,
                        max,
                        weight,
                    },
                )
            };
        }
        match step.layout.size.kv_dtype {
            KvDtype::F32 => attend!(f32),
            KvDtype::Bf16 => attend!(u16),
        }
        for row in 0..n_rows {
            let (token, head) = (first + start + row / group, kv_head * group + row % group);
            // SAFETY: this head of this token over this range is this worker's piece.
            let part = unsafe { step.memory.write(self.part(step, range, token, head)) };
            part[..d].copy_from_slice(&sums[row * d..][..d]);
            (part[d], part[d + 1]) = (max[row], weight[row]);
        }
    }
}

/// Turns the first pairs of `x` by `table`: cosines, then sines.
fn rotate(style: RopeStyle, table: &[f32], x: &mut [f32]) {
    let (cos, sin) = table.split_at(table.len() / 2);
    let turn = |u: f32, v: f32, j: usize| (u * cos[j] - v * sin[j], u * sin[j] + v * cos[j]);
    match style {
        RopeStyle::Neox => {
            let (first, second) = x[..table.len()].split_at_mut(cos.len());
            for (j, (u, v)) in first.iter_mut().zip(second).enumerate() {
                (*u, *v) = turn(*u, *v, j);
            }
        }
        RopeStyle::Adjacent => {
            for (j, pair) in x[..table.len()].chunks_exact_mut(2).enumerate() {
                (pair[0], pair[1]) = turn(pair[0], pair[1], j);
            }
        }
    }
}

/// Attention of the query rows of a piece over a range of keys of one head.
struct Attend<'a, T> {
    d: usize,
    /// Query rows of a token.
    group: usize,
    /// Keys that the first token sees; each later one sees one more.
    first_visible: usize,
    keys: Range<usize>,
    /// `[n_keys, d]`.
    k: *const T,
    /// `[n_keys, d]`.
    v: *const T,
    /// `[n_rows, d]`, scaled.
    queries: &'a [f32],
    /// `[n_rows, d]`: sums of weight times value.
    sums: &'a mut [f32],
    /// `[n_rows, KEYS]`.
    scores: &'a mut [f32],
    /// `[KEYS, d]`.
    converted: &'a mut [f32],
    /// `[n_rows]`: largest score so far.
    max: &'a mut [f32],
    /// `[n_rows]`: sum of weights.
    weight: &'a mut [f32],
}

impl<T: Element> Kernel for Attend<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<V: Simd>(self) {
        let (d, n_rows) = (self.d, self.max.len());
        assert!(d.is_multiple_of(V::LANES) && self.queries.len() == n_rows * d && self.sums.len() == n_rows * d);
        assert!(self.scores.len() == n_rows * KEYS && self.converted.len() == KEYS * d && self.weight.len() == n_rows);
        let in_place = n_rows <= QUERIES_IN_PLACE;
        let converted = self.converted.as_mut_ptr();
        let (q, scores, sums) = (self.queries.as_ptr(), self.scores.as_mut_ptr(), self.sums.as_mut_ptr());
        for start in self.keys.clone().step_by(KEYS) {
            let n = KEYS.min(self.keys.end - start);
            // SAFETY: keys below `keys.end` exist in the cache, and the scratch has the sizes that were checked above.
            unsafe {
                let k = self.k.add(start * d);
                if in_place {
                    stream_product_transposed::<V, T>([n_rows, n, d], q, k, (scores, KEYS));
                } else {
                    convert::<V, T>(k, converted, n * d);
                    product_transposed::<V>([n_rows, n, d], (q, d), (converted, d), (scores, KEYS));
                }
                for row in 0..n_rows {
                    let visible = (self.first_visible + row / self.group).saturating_sub(start).min(n);
                    let scores = &mut self.scores[row * KEYS..][..KEYS];
                    scores[visible..].fill(f32::NEG_INFINITY);
                    let p = scores.as_mut_ptr();
                    let lanes = (0..KEYS).step_by(V::LANES);
                    let largest = |max: V, i| V::load(p.add(i)).max(max);
                    let max = lanes.clone().fold(V::splat(self.max[row]), largest).largest();
                    if max > self.max[row] {
                        let factor = (self.max[row] - max).exp();
                        self.max[row] = max;
                        self.weight[row] *= factor;
                        let sums = sums.add(row * d);
                        for i in (0..d).step_by(V::LANES) {
                            V::load(sums.add(i)).mul(V::splat(factor)).store(sums.add(i));
                        }
                    }
                    lanes.clone().for_each(|i| exp(V::load(p.add(i)).sub(V::splat(max))).store(p.add(i)));
                    // Also the NaN of a row that has seen no key yet and sees none of these.
                    std::slice::from_raw_parts_mut(p.add(visible), KEYS - visible).fill(0.0);
                    self.weight[row] += lanes.fold(V::splat(0.0), |sum: V, i| sum.add(V::load(p.add(i)))).sum();
                }
                let v = self.v.add(start * d);
                if in_place {
                    stream_add_product::<V, T>([n_rows, d, n], (scores, KEYS), v, sums);
                } else {
                    convert::<V, T>(v, converted, n * d);
                    add_product::<V>([n_rows, d, n], (scores, KEYS), (converted, d), (sums, d));
                }
            }
        }
    }
}

/// `to[i] = from[i]` as f32.
///
/// # Safety
/// Both hold `n` elements, a multiple of `V::LANES`.
#[inline(always)]
unsafe fn convert<V: Simd, T: Element>(from: *const T, to: *mut f32, n: usize) {
    for i in (0..n).step_by(V::LANES) {
        // SAFETY: as the caller promises.
        unsafe { T::load::<V>(from.add(i)).store(to.add(i)) };
    }
}
