//! `Moe`: router products; every worker then picks and sorts the experts for itself (the same for all of them), so
//! that each expert multiplies its tokens together and the rows of all chosen experts are one space; down projections
//! of a run of rows go through all experts and are summed by one worker.

use crate::ahead::{Ahead, ask_for_first};
use crate::ffn::gate_up;
use crate::handoff::Choices;
use crate::norm::{add_scaled, rms_norm};
use crate::pool::Worker;
use crate::projection::{Cut, Projection, ROWS, for_each_run, own_rows, share_rows, vector};
use crate::step::Step;
use crate::{Activations, Error, Forms, Isa};
use std::collections::TryReserveError;
use std::ops::Range;
use std::sync::Arc;
use tandem_spec::{Moe, MoeShape, SharedExpert, TensorSource, Weight};

/// A token's use of an expert.
#[derive(Clone, Copy, Debug)]
struct Choice {
    expert: u32,
    token: u32,
    weight: f32,
}

/// Experts of the tokens of a step, by one worker.
pub(crate) struct Routing {
    /// Token by token.
    chosen: Vec<Choice>,
    /// The same, expert by expert, tokens ascending.
    sorted: Vec<Choice>,
    /// Number of choices of each expert, then the end of each in `sorted`.
    ends: Vec<u32>,
    /// Experts with tokens, ascending, and where in `sorted` their choices begin.
    active: Vec<(u32, u32)>,
}

impl Routing {
    /// Tables for up to `n_experts` experts and `n_choices` = tokens x experts of a token.
    pub fn new(n_experts: usize, n_choices: usize) -> Result<Self, TryReserveError> {
        let mut new = Self { chosen: Vec::new(), sorted: Vec::new(), ends: Vec::new(), active: Vec::new() };
        new.chosen.try_reserve_exact(n_choices)?;
        new.sorted.try_reserve_exact(n_choices)?;
        new.ends.try_reserve_exact(n_experts)?;
        new.active.try_reserve_exact(n_experts)?;
        Ok(new)
    }

    /// Bytes that [`Routing::new`] allocates.
    pub fn n_bytes(n_experts: usize, n_choices: usize) -> usize {
        2 * n_choices * size_of::<Choice>() + n_experts * (size_of::<u32>() + size_of::<(u32, u32)>())
    }

    /// Bytes that were allocated.
    pub fn allocated(&self) -> usize {
        let choices = self.chosen.capacity() + self.sorted.capacity();
        choices * size_of::<Choice>()
            + self.ends.capacity() * size_of::<u32>()
            + self.active.capacity() * size_of::<(u32, u32)>()
    }

    /// Chooses the `n_used` largest of each token's `logits(token)` (of equal ones the first), with the softmax over
    /// the chosen as weights, which is the renormalised softmax over all.
    fn route<'a>(&mut self, n_tokens: usize, n_experts: usize, n_used: usize, logits: impl Fn(usize) -> &'a [f32]) {
        self.chosen.clear();
        for token in 0..n_tokens {
            let first = self.chosen.len();
            for (expert, &weight) in logits(token).iter().enumerate() {
                let best = &self.chosen[first..];
                if best.len() == n_used && weight <= best[n_used - 1].weight {
                    continue;
                }
                let at = first + best.iter().position(|c| c.weight < weight).unwrap_or(best.len());
                self.chosen.truncate(first + n_used - 1);
                // A NaN compares with nothing and would go behind the end.
                let at = at.min(self.chosen.len());
                self.chosen.insert(at, Choice { expert: expert as u32, token: token as u32, weight });
            }
            let best = &mut self.chosen[first..];
            let max = best[0].weight;
            best.iter_mut().for_each(|c| c.weight = (c.weight - max).exp());
            let sum: f32 = best.iter().map(|c| c.weight).sum();
            best.iter_mut().for_each(|c| c.weight /= sum);
        }
        self.sort(n_tokens, n_experts);
    }

    /// Takes over what the block's home has chosen, as far as the experts are `held` here; they are counted from the
    /// first of them.
    fn take(&mut self, n_tokens: usize, n_used: usize, choices: &Choices, held: &Range<usize>) {
        self.chosen.clear();
        for token in 0..n_tokens {
            for i in token * n_used..(token + 1) * n_used {
                if let Some(expert) = choices.expert(i).filter(|e| held.contains(e)) {
                    let (expert, token) = ((expert - held.start) as u32, token as u32);
                    self.chosen.push(Choice { expert, token, weight: choices.weight(i) });
                }
            }
        }
        self.sort(n_tokens, held.len());
    }

    /// Groups the choices by expert, each of which a token has once.
    fn sort(&mut self, n_tokens: usize, n_experts: usize) {
        self.ends.clear();
        self.ends.resize(n_experts, 0);
        self.chosen.iter().for_each(|c| self.ends[c.expert as usize] += 1);
        self.active.clear();
        let mut start = 0;
        for (expert, end) in self.ends.iter_mut().enumerate() {
            assert!(*end as usize <= n_tokens, "expert {expert} was chosen {end} times for {n_tokens} tokens");
            if *end > 0 {
                self.active.push((expert as u32, start));
            }
            // The place of the expert's next choice, until the loop below has moved it to the end.
            start += std::mem::replace(end, start);
        }
        self.sorted.clear();
        self.sorted.resize(self.chosen.len(), Choice { expert: 0, token: 0, weight: 0.0 });
        for c in &self.chosen {
            let at = &mut self.ends[c.expert as usize];
            self.sorted[*at as usize] = *c;
            *at += 1;
        }
    }
}

/// Where the hidden rows of the shared expert begin, behind those of all choices: at a multiple of every block length.
pub(crate) fn shared_start(shape: &MoeShape, n_tokens: usize) -> usize {
    (n_tokens * shape.n_used * shape.n_ff).next_multiple_of(256)
}

/// Of one token's experts, bytes that are asked for before the rows of another expert are multiplied, and before a
/// barrier.
const FIRST_BYTES: usize = 3072;
const BARRIER_BYTES: usize = 16384;

struct SharedBlock {
    /// `[1, n_embd]`.
    gate_inp: Option<Projection>,
    gate: Projection,
    up: Projection,
    down: Projection,
}

/// A mixture-of-experts block, or a share of one.
pub(crate) struct MoeBlock {
    shape: MoeShape,
    /// Experts that are here.
    experts: Range<usize>,
    /// `[n_embd]`.
    ffn_norm: Box<[f32]>,
    /// `[n_experts, n_embd]`; without rows in a share whose home is elsewhere.
    router: Projection,
    /// For each expert `[n_ff, n_embd]`.
    gate: Vec<Projection>,
    /// For each expert `[n_ff, n_embd]`.
    up: Vec<Projection>,
    /// For each expert `[n_embd, n_ff]`.
    down: Vec<Projection>,
    shared: Option<SharedBlock>,
}

impl MoeBlock {
    /// Packs the weights of `block`.
    pub fn load(block: &Moe<Weight>, source: &dyn TensorSource, isa: Isa) -> Result<Self, Error> {
        let n = block.experts.len();
        let plain = |w: &Weight| Ok::<_, Error>(Projection::plain(Arc::new(crate::Matrix::pack(w, source, isa)?)));
        let shared = |s: &SharedExpert<Weight>| {
            Ok::<_, Error>(SharedBlock {
                gate_inp: s.ffn_gate_inp_shexp.as_ref().map(plain).transpose()?,
                gate: Projection::load(&s.ffn_gate_shexp, source, isa)?,
                up: Projection::load(&s.ffn_up_shexp, source, isa)?,
                down: Projection::load(&s.ffn_down_shexp, source, isa)?,
            })
        };
        let shared = block.shared.as_ref().map(shared).transpose()?;
        Ok(Self {
            shape: block.shape.clone(),
            experts: block.experts.clone(),
            ffn_norm: vector(&block.ffn_norm, source),
            router: plain(&block.ffn_gate_inp)?,
            gate: Projection::load_stack(&block.ffn_gate_exps, n, source, isa)?,
            up: Projection::load_stack(&block.ffn_up_exps, n, source, isa)?,
            down: Projection::load_stack(&block.ffn_down_exps, n, source, isa)?,
            shared,
        })
    }

    /// Bytes of the weights.
    pub fn n_bytes(&self) -> usize {
        size_of_val(&*self.ffn_norm) + self.routed().chain(self.unrouted()).map(|p| p.n_bytes()).sum::<usize>()
    }

    /// What every token multiplies with: the router and the shared expert.
    fn unrouted(&self) -> impl Iterator<Item = &Projection> {
        let shared = self.shared.iter().flat_map(|s| [&s.gate, &s.up, &s.down].into_iter().chain(&s.gate_inp));
        [&self.router].into_iter().chain(shared)
    }

    /// What a token multiplies with that chooses experts at equal distances, the first of them `draw`.
    pub fn projections(&self, draw: usize) -> impl Iterator<Item = &Projection> {
        let (n, n_used) = (self.gate.len(), self.shape.n_used.min(self.gate.len()));
        let chosen = (0..n_used).map(move |i| (draw + i * n / n_used) % n);
        self.unrouted().chain(chosen.flat_map(|e| [&self.gate[e], &self.up[e], &self.down[e]]))
    }

    /// Gates, ups and downs of the routed experts.
    pub fn routed(&self) -> impl Iterator<Item = &Projection> {
        [&self.gate, &self.up, &self.down].into_iter().flatten()
    }

    /// The router and, where there is one, the gate of the shared expert, which one stage multiplies with, and their
    /// number.
    pub fn routers(&self) -> ([&Projection; 2], usize) {
        match self.shared.as_ref().and_then(|s| s.gate_inp.as_ref()) {
            Some(gate_inp) => ([&self.router, gate_inp], 2),
            None => ([&self.router; 2], 1),
        }
    }

    /// Reads ahead what this worker will multiply if `experts` are chosen, the likeliest first.
    pub fn read_experts_ahead(&self, w: &Worker, experts: impl Iterator<Item = usize>, ahead: &mut Ahead) {
        let [hidden, out] = [self.shape.n_ff, self.shape.n_embd].map(|n| share_rows(w, w.index, n));
        for e in experts.filter(|e| self.experts.contains(e)).map(|e| e - self.experts.start) {
            let parts = [(&self.gate[e], &hidden), (&self.up[e], &hidden), (&self.down[e], &out)];
            if !parts.into_iter().all(|(p, rows)| ahead.rows(&p.matrix, rows.clone())) {
                return;
            }
        }
    }

    /// Adds the block to the residual stream.
    pub fn run(&self, w: &Worker, step: &Step, routing: &mut Routing) {
        let MoeShape { n_embd, n_experts, n_used, n_ff, n_ff_shared, rms_eps } = self.shape;
        let (n_tokens, isa) = (step.n_tokens, step.isa);
        let normed = |token: usize, row: &mut [f32]| {
            // SAFETY: nobody writes the residual stream before the down projections.
            let x = unsafe { step.x.read(step.row(token, 0..n_embd)) };
            rms_norm(isa, x, &self.ffn_norm, rms_eps, row);
        };
        let expert_forms = self.gate[0].forms().or(self.up[0].forms());
        let (routers, n_routers) = self.routers();
        let mut forms = expert_forms;
        if step.choices.is_none() {
            forms = routers[..n_routers].iter().fold(forms, |forms, p| forms.or(p.forms()));
        }
        if let Some(s) = &self.shared {
            forms = forms.or(s.gate.forms()).or(s.up.forms());
        }
        let h = step.prepare(w, &step.buffers.normed, n_tokens, n_embd, forms, |i, row| {
            normed(i, row);
            row
        });

        // SAFETY: nobody writes the wide scratch from the barrier below to the next block.
        let wide = |token: usize, cols| unsafe { step.memory.read(step.wide(token, cols)) };
        if let Some(choices) = &step.choices {
            routing.take(n_tokens, n_used, choices, &self.experts);
        } else {
            for_each_run(w, n_tokens, &routers[..n_routers], |index, rows| {
                let cols = index * n_experts + rows.start..index * n_experts + rows.end;
                let out = step.memory.ptr(step.wide(0, cols.clone()).start..step.wide(n_tokens - 1, cols).end);
                // SAFETY: these rows of the projection are this worker's, in every token.
                unsafe { routers[index].apply(isa, rows, &h, out, step.layout.wide_len) };
            });
            step.barrier_reading(w, |ahead| {
                // The experts are not known yet.
                if let Some(s) = &self.shared {
                    let rows = share_rows(w, w.index, n_ff_shared);
                    let _ = ahead.rows(&s.gate.matrix, rows.clone()) && ahead.rows(&s.up.matrix, rows);
                }
            });
            routing.route(n_tokens, n_experts, n_used, |token| wide(token, 0..n_experts));
        }
        // The choices of expert number `i` of the active ones.
        let choices = |i: usize| {
            let (expert, start) = routing.active[i];
            let end = routing.ends[expert as usize];
            (expert as usize, start as usize..end as usize)
        };
        // With one token, the row of `h` is the row of every expert.
        let alone = n_tokens == 1;
        if !alone {
            let row = step.row_of(w);
            for i in w.share(routing.active.len()) {
                let (_, range) = choices(i);
                let to = step.buffers.sorted.view(range.start * n_embd, range.len(), n_embd, expert_forms);
                for (at, choice) in routing.sorted[range].iter().enumerate() {
                    normed(choice.token as usize, &mut row[..n_embd]);
                    // SAFETY: the experts of a share are this worker's own.
                    unsafe { to.write(at, 0, &row[..n_embd]) };
                }
            }
            w.barrier();
        }
        let inputs = |range: &Range<usize>| match alone {
            true => h,
            false => step.buffers.sorted.view(range.start * n_embd, range.len(), n_embd, expert_forms),
        };
        let shared_start = shared_start(&self.shape, n_tokens);
        let n_active = routing.active.len();
        let n_ff_shared = self.shared.as_ref().map_or(0, |_| n_ff_shared);
        let n_units = n_active + usize::from(self.shared.is_some());
        let cut = Cut::new(n_active * n_ff + n_ff_shared, w.n_workers(), n_tokens);
        // One token: a worker has the same rows of whatever experts are chosen. Many: an expert's rows of activations
        // stay in a cache while its weights pass.
        let n_owners = if alone { w.n_workers() } else { 1 };
        let n_pieces = (n_ff.max(n_ff_shared).div_ceil(ROWS).div_ceil(n_owners) * ROWS).div_ceil(cut.rows); // of a unit
        let unit_runs = w.runs(n_owners * n_units * n_pieces, cut.longest).flat_map(|run| {
            (run.start / n_pieces..run.end.div_ceil(n_pieces)).map(move |unit| {
                let first = unit * n_pieces;
                (unit / n_units, unit % n_units, run.start.max(first) - first..(run.end - first).min(n_pieces))
            })
        });
        let tile = step.tile(w);
        for (owner, unit, pieces) in unit_runs {
            let n = if unit < n_active { n_ff } else { n_ff_shared };
            let all = if alone { share_rows(w, owner, n) } else { 0..n };
            let rows = cut.rows_of(pieces, all.len());
            let rows = all.start + rows.start..all.start + rows.end;
            if rows.is_empty() {
                continue;
            }
            if unit < n_active {
                let (expert, range) = choices(unit);
                let at = |choice: usize, col: usize| choice * n_ff + col;
                let out = step.memory.ptr(step.hidden(at(range.start, rows.start)..at(range.end - 1, rows.end)));
                let (gate, up) = (&self.gate[expert], &self.up[expert]);
                if alone {
                    let next = routing.active.get(unit + 1).map(|(e, _)| &self.gate[*e as usize]);
                    let soon = [Some((up, &rows)), next.filter(|_| rows.end == all.end).map(|gate| (gate, &all))];
                    soon.into_iter().flatten().for_each(|(p, r)| ask_for_first(&p.matrix, r.clone(), FIRST_BYTES));
                }
                // SAFETY: these hidden columns of the expert are this worker's.
                unsafe { gate_up(isa, gate, up, rows, &inputs(&range), (out, n_ff), tile) };
            } else if let Some(s) = &self.shared {
                let at = |token: usize, col: usize| shared_start + token * n_ff_shared + col;
                let out = step.memory.ptr(step.hidden(at(0, rows.start)..at(n_tokens - 1, rows.end)));
                // SAFETY: as above.
                unsafe { gate_up(isa, &s.gate, &s.up, rows, &h, (out, n_ff_shared), tile) };
            }
        }
        // The first of what follows comes from memory while workers wait for each other.
        if let Some((expert, _)) = routing.active.first().filter(|_| alone) {
            let rows = share_rows(w, w.index, n_embd);
            ask_for_first(&self.down[*expert as usize].matrix, rows, BARRIER_BYTES);
        }
        step.barrier_reading(w, |ahead| {
            let routed = routing.active.iter().map(|(expert, _)| &self.down[*expert as usize]);
            let downs = routed.chain(self.shared.iter().map(|s| &s.down));
            own_rows(w, n_embd).all(|rows| downs.clone().all(|p| ahead.rows(&p.matrix, rows.clone())));
        });

        // One token: every worker rounds the hidden rows for itself; else by experts.
        let buffer = if alone { &step.buffers.own[w.index] } else { &step.buffers.hidden };
        let down_forms = self.down[0].forms();
        let hidden = |range: &Range<usize>| buffer.view(range.start * n_ff, range.len(), n_ff, down_forms);
        let shared_forms = self.shared.as_ref().map_or(Forms::default(), |s| s.down.forms());
        let shared_hidden = buffer.view(shared_start, n_tokens, n_ff_shared, shared_forms);
        let round = |to: &Activations, first: usize, row: usize, n: usize| {
            // SAFETY: nobody writes the hidden scratch in this stage, and the rows of `to` are this worker's.
            unsafe { to.write(row, 0, step.memory.read(step.hidden(first + row * n..first + (row + 1) * n))) }
        };
        for i in if alone { 0..routing.active.len() } else { w.share(routing.active.len()) } {
            let (_, range) = choices(i);
            let to = hidden(&range);
            (0..range.len()).for_each(|row| round(&to, range.start * n_ff, row, n_ff));
        }
        for row in if alone { 0..n_tokens } else { w.share(n_tokens) } {
            round(&shared_hidden, shared_start, row, n_ff_shared);
        }
        if !alone {
            w.barrier();
        }

        for_each_run(w, n_tokens, &[&self.down[0]], |_, rows| {
            let n = rows.len();
            // SAFETY: these columns are this worker's, in every token.
            unsafe { step.begin_sum(rows.clone()) };
            // SAFETY: as above.
            let x = |token: usize| unsafe { step.target(token, rows.clone()) };
            for i in 0..routing.active.len() {
                let (expert, range) = choices(i);
                if let Some((next, _)) = routing.active.get(i + 1).filter(|_| alone) {
                    ask_for_first(&self.down[*next as usize].matrix, rows.clone(), FIRST_BYTES);
                }
                // SAFETY: the tile is this worker's own.
                unsafe { self.down[expert].apply(isa, rows.clone(), &hidden(&range), tile.as_mut_ptr(), n) };
                for (choice, y) in routing.sorted[range].iter().zip(tile.chunks_exact(n)) {
                    add_scaled(isa, x(choice.token as usize), choice.weight, y);
                }
            }
            if let Some(s) = &self.shared {
                // SAFETY: the tile is this worker's own.
                unsafe { s.down.apply(isa, rows.clone(), &shared_hidden, tile.as_mut_ptr(), n) };
                for (token, y) in tile.chunks_exact(n).take(n_tokens).enumerate() {
                    let gate = s.gate_inp.as_ref().map(|_| wide(token, n_experts..n_experts + 1)[0]);
                    add_scaled(isa, x(token), gate.map_or(1.0, |g| 1.0 / (1.0 + (-g).exp())), y);
                }
            }
        });
    }
}
