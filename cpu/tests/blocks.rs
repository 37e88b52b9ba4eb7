//! Every block on every instruction set of this processor against the exact reference, over the table of cases:
//! several sequences a step, every worker count, snapshots, and any cut of a prompt. Prints which were run.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use tandem_cpu::handoff::{ELSEWHERE, Handoff, Memory, Task};
use tandem_cpu::{Backend, Error, Isa, Options, State, StateSize, for_each_weight};
use tandem_spec::testing::{Buffers, Case, Maker, Poisoned, Rng, Shape, cases, max_abs, relative_rms_of_rows};
use tandem_spec::{Batch, Block, Head, HeadShape, KvDtype, Linear, Model, TensorType, Weight, math};

/// Widths below this are quick, also where every access to memory is checked.
const NARROW: usize = 512;

fn isas() -> Vec<Isa> {
    let isas: Vec<_> = Isa::ALL.into_iter().filter(|i| i.is_available()).collect();
    println!("instruction sets: {}", isas.iter().map(|i| i.name()).collect::<Vec<_>>().join(", "));
    isas
}

fn model(case: &Case, block: Block<Weight>) -> Model {
    Model {
        arch: "test".into(),
        name: case.name.clone(),
        n_embd: case.n_embd(),
        n_vocab: case.n_vocab(),
        n_layers: 1,
        n_ctx_train: 1024,
        blocks: vec![block],
        mtp: None,
    }
}

fn load(model: &Model, source: &Buffers, isa: Isa, threads: usize) -> Backend {
    let indices: Vec<usize> = (0..model.blocks.len()).collect();
    Backend::load(model, &indices, source, Options { threads, isa }, &|_| {}).expect("the backend loads")
}

fn size(case: &Case) -> StateSize {
    let n_batch = case.steps.iter().map(|runs| runs.iter().map(|r| r.1).sum()).max().unwrap_or(1);
    StateSize { n_slots: case.n_slots, n_ctx: 600, n_batch, kv_dtype: case.kv_dtype }
}

/// What a case gives, in the form of [`Case::expected`].
fn run(case: &Case, backend: &Backend, inputs: &[(Batch, Vec<f32>)]) -> Vec<Vec<f32>> {
    let mut state = backend.state(size(case)).expect("memory");
    let step = |(batch, before): &(Batch, Vec<f32>)| {
        let mut x = Poisoned::new(before.len());
        x.out().copy_from_slice(before);
        let is_head = matches!(case.shape, Shape::Head(_));
        let mut logits = Poisoned::new(if is_head { batch.wanted.len() * case.n_vocab() } else { 0 });
        backend.run(0..1, batch, &mut state, x.out(), logits.out()).expect("the step runs");
        match case.shape {
            Shape::Head(_) => logits.checked().to_vec(),
            Shape::Embed { .. } => x.checked().to_vec(),
            _ => x.checked().iter().zip(before).map(|(x, b)| x - b).collect(),
        }
    };
    inputs.iter().map(step).collect()
}

/// Largest error of a row that a case may have: that of f32 sums, or of what else is rounded.
fn bound(case: &Case) -> f64 {
    match (case.types.iter().any(|ty| ty.is_quantised()), &case.shape) {
        // Activations have 8 bits. The norm of a delta net's heads amplifies that at the first positions, where o is
        // small.
        (true, Shape::DeltaNet(_)) => 0.15,
        (true, _) => 0.05,
        // A key or value that lies between two bf16 numbers may be rounded to the other one.
        (false, _) if case.kv_dtype == KvDtype::Bf16 => 1e-3,
        (false, _) => 2e-5,
    }
}

/// Runs the cases whose width is in `widths`.
fn check(widths: Range<usize>) {
    let isas = isas();
    let mut worst: BTreeMap<(&str, &str, bool), (f64, String)> = BTreeMap::new();
    let mut failures = Vec::new();
    for case in cases().into_iter().filter(|c| widths.contains(&c.n_embd())) {
        let (block, source) = case.block();
        let inputs = case.inputs();
        let expected = case.expected(&block, &source, &inputs);
        let n_cols = if matches!(case.shape, Shape::Head(_)) { case.n_vocab() } else { case.n_embd() };
        let model = model(&case, block);
        for &isa in &isas {
            for threads in [1, 3] {
                let backend = load(&model, &source, isa, threads);
                for (step, (got, want)) in run(&case, &backend, &inputs).iter().zip(&expected).enumerate() {
                    let error = relative_rms_of_rows(got, want, n_cols);
                    if error > bound(&case) {
                        failures.push(format!(
                            "{} on {}, {threads} threads, step {step}: {error:e}",
                            case.name,
                            isa.name()
                        ));
                    }
                    let quantised = case.types.iter().any(|ty| ty.is_quantised());
                    let entry = worst.entry((isa.name(), model.blocks[0].kind(), quantised)).or_default();
                    if error > entry.0 {
                        *entry = (error, case.name.clone());
                    }
                }
            }
        }
    }
    for ((isa, kind, quantised), (error, name)) in worst {
        let kind = format!("{kind}{}", if quantised { ", quantised" } else { "" });
        println!("{isa:8} {kind:22} worst row {error:.2e} ({name})");
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

/// Every kernel, layout and tail.
#[test]
fn narrow_blocks_match_the_reference() {
    check(0..NARROW);
}

#[test]
fn blocks_of_released_widths_match_the_reference() {
    check(NARROW..usize::MAX);
}

/// Cases of a block that keeps states.
fn cases_with_states() -> impl Iterator<Item = Case> {
    let keeps = |c: &Case| matches!(c.shape, Shape::Attention { .. } | Shape::DeltaNet(_));
    cases().into_iter().filter(move |c| keeps(c) && c.n_embd() < NARROW)
}

/// A sequence of noise for `case`: its residual stream `[n_tokens, n_embd]`.
fn stream(case: &Case, n_tokens: usize) -> Vec<f32> {
    Rng::new(case.seed ^ 0xc0ffee).normals(n_tokens * case.n_embd(), 1.0)
}

/// Runs tokens `range` of `x` in `slot`.
fn run_part(backend: &Backend, state: &mut State, x: &mut [f32], n_embd: usize, slot: usize, range: Range<usize>) {
    let batch = Batch::single(slot, range.start, &vec![0; range.len()], false);
    let x = &mut x[range.start * n_embd..range.end * n_embd];
    backend.run(0..1, &batch, state, x, &mut []).expect("the step runs");
}

/// A prompt gives the same in one batch, in chunks and token by token, and after a return to a snapshot.
#[test]
fn chunks_and_snapshots_agree() {
    const N: usize = 140;
    for isa in isas() {
        for case in cases_with_states() {
            let (block, source) = case.block();
            let (model, n_embd) = (model(&case, block), case.n_embd());
            let backend = load(&model, &source, isa, 2);
            let size = StateSize { n_slots: 2, n_ctx: N, n_batch: N, kv_dtype: case.kv_dtype };
            let mut state = backend.state(size).expect("memory");
            let before = stream(&case, N);
            let mut whole = before.clone();
            run_part(&backend, &mut state, &mut whole, n_embd, 1, 0..N);
            let whole: Vec<f64> = whole.iter().map(|x| f64::from(*x)).collect();
            for chunk in [1, 7, 64] {
                state.reset_slot(1);
                let mut x = before.clone();
                let mut start = 0;
                while start < N {
                    let end = (start + chunk).min(N);
                    let snapshot = state.snapshot(1);
                    assert_eq!(snapshot.n_bytes(), state.snapshot_bytes());
                    // A detour that the snapshot undoes.
                    if start % 4 == 0 {
                        let mut detour = x.clone();
                        detour.rotate_left(n_embd / 2);
                        run_part(&backend, &mut state, &mut detour, n_embd, 1, start..end);
                        state.restore(1, &snapshot);
                    }
                    run_part(&backend, &mut state, &mut x, n_embd, 1, start..end);
                    start = end;
                }
                let error = max_abs(&x, &whole);
                assert!(error < 1e-3, "{} on {}, chunks of {chunk}: {error:e}", case.name, isa.name());
            }
        }
    }
}

/// Planned bytes are those allocated, for weights (a shared table counts once) and for states.
#[test]
fn planned_bytes_are_allocated_bytes() {
    let isa = Isa::detect();
    for case in cases() {
        let (block, source) = case.block();
        let model = model(&case, block);
        let backend = load(&model, &source, isa, 2);
        assert_eq!(backend.weight_bytes(), Backend::planned_weight_bytes(&model, &[0], isa), "{}", case.name);
        let planned = Backend::planned_state_bytes(&model, &[0], size(&case), 2).expect("a size");
        let state = backend.state(size(&case)).expect("memory");
        assert_eq!(state.bytes(), planned, "{}", case.name);
    }
    let mut maker = Maker::new(1, &[TensorType::Q8_0]);
    let embed = maker.embed(96, 64);
    let output = Linear { weight: embed.token_embd.clone(), scale: None, bias: None };
    let output_norm = maker.vector("output_norm.weight", 64, 1.0, 0.1);
    let head = Head { shape: HeadShape { n_embd: 64, n_vocab: 96, rms_eps: 1e-6 }, output_norm, output };
    let mut tied = model(&cases()[0], Block::Embed(embed));
    tied.blocks.push(Block::Head(head));
    let table = Backend::planned_weight_bytes(&tied, &[0], isa);
    assert_eq!(load(&tied, &maker.source, isa, 1).weight_bytes(), table + 4 * 64);
}

/// Any number of workers reads all matrices but the embedding table once, and of a mixture as many experts as a token
/// has.
#[test]
fn all_weights_of_a_token_are_read() {
    let isa = Isa::detect();
    for case in cases() {
        let (block, source) = case.block();
        let chosen =
            |n: u64| if let Block::Moe(b) = &block { n * b.shape.n_used as u64 / b.experts.len() as u64 } else { n };
        let (mut bytes, mut padding) = (0, 0);
        for_each_weight(&block, isa, &mut |w, n| {
            let is_vector = ["norm", "bias", "conv1d", "ssm_dt", "ssm_a."].iter().any(|part| w.name.contains(part));
            if !is_vector && !matches!(block, Block::Embed(_)) {
                bytes += if w.name.contains("_exps") { chosen(n) } else { n };
                padding += 64;
            }
        });
        let model = model(&case, block.clone());
        for threads in 1..=3 {
            let backend = load(&model, &source, isa, threads);
            for draw in [0, 1, 1000] {
                let read = backend.read_weights(draw) as u64;
                assert!(
                    read <= bytes && bytes <= read + padding,
                    "{}: {read} of {bytes} bytes, draw {draw}",
                    case.name
                );
            }
        }
    }
}

/// What the caller may get wrong is an error that says what: no panic, no abort.
#[test]
fn wrong_requests_are_errors() {
    let case = cases_with_states().next().expect("a case");
    let (block, source) = case.block();
    let model = model(&case, block);
    let backend = load(&model, &source, Isa::detect(), 1);
    let size = StateSize { n_slots: 1, n_ctx: 8, n_batch: 4, kv_dtype: KvDtype::F32 };
    let too_long = StateSize { n_ctx: 1 << 60, ..size };
    assert!(matches!(backend.state(too_long), Err(Error::Memory { .. })));
    assert!(Backend::planned_state_bytes(&model, &[0], StateSize { n_ctx: usize::MAX, ..size }, 1).is_none());
    let mut state = backend.state(size).expect("memory");
    let mut x = vec![0.0; 16 * case.n_embd()];
    for (batch, part) in [
        (Batch::single(0, 0, &[0; 5], false), "room for 4"),
        (Batch::single(0, 6, &[0; 3], false), "context of 8"),
        (Batch::single(1, 0, &[0], false), "slot 1"),
        (Batch::single(0, 0, &[case.n_vocab() as u32], false), "token id"),
    ] {
        let error = backend.run(0..1, &batch, &mut state, &mut x, &mut []).expect_err("refused").to_string();
        assert!(error.contains(part), "{error}");
    }
    let options = Options { threads: 1, isa: Isa::Avx512 };
    let loaded = Backend::load(&model, &[0], &source, options, &|_| {});
    assert_eq!(loaded.is_ok(), Isa::Avx512.is_available());
}

/// The other side of a step, ready when it was asked `LOOKS` times whether it is; it gives up at task `gives_up_at`.
struct Desk {
    memory: Memory,
    posted: AtomicUsize,
    looks: AtomicUsize,
    gives_up_at: usize,
}

/// So that workers read ahead for a while, and are interrupted.
const LOOKS: usize = 60;
/// What it foresees, right or wrong: experts that are there, that are not for the CPU, and that no model has.
const FORESEEN: [u32; 6] = [2, 1 | ELSEWHERE, 1000, 1, 3, ELSEWHERE - 1];

// SAFETY: the workers use the memory by turns, as they do in a step.
unsafe impl Sync for Desk {}

// SAFETY: the memory is the test's own, which leaves it alone while the backend serves.
unsafe impl Handoff for Desk {
    fn memory(&self) -> Memory {
        self.memory
    }

    fn is_ready(&self, _: usize) -> bool {
        self.looks.fetch_add(1, Ordering::Relaxed) >= LOOKS
    }

    fn foreseen(&self, _: usize, i: usize) -> Option<u32> {
        FORESEEN.get(i).copied()
    }

    fn wait(&self, task: usize) -> bool {
        assert_eq!(task, self.posted.load(Ordering::Relaxed), "one task after the other");
        task != self.gives_up_at
    }

    fn post(&self, task: usize) {
        assert_eq!(task, self.posted.fetch_add(1, Ordering::Relaxed));
    }
}

/// A share of a feed-forward block leaves the residual stream alone and gives what its rows or experts add; of the
/// chosen experts it takes those that are neither elsewhere nor marked so. What its workers read ahead changes nothing.
#[test]
fn shares_give_their_part_of_the_sum() {
    let mut n_checked = 0;
    for case in cases() {
        let part = match &case.shape {
            Shape::Ffn(s) if s.n_ff > 256 => 256..s.n_ff,
            Shape::Moe(s) if s.n_experts > 2 => 1..s.n_experts,
            _ => continue,
        };
        let (block, source) = case.block();
        let share = block.share(part.clone(), false);
        let matrices = |w: &Weight| Ok::<_, std::convert::Infallible>(tandem_spec::Matrix::decode(w, &source));
        let (Ok(exact), Ok(whole)) = (share.try_map(&mut |w| matrices(w)), block.try_map(&mut |w| matrices(w)));
        let model = model(&case, share);
        for (batch, x) in case.inputs() {
            let (n_tokens, n_embd) = (batch.tokens.len(), case.n_embd());
            let mut want: Vec<f64> = x.iter().map(|v| f64::from(*v)).collect();
            let (mut ids, mut weights) = (Vec::new(), Vec::new());
            match (&exact, &whole) {
                (Block::Ffn(b), _) => b.reference(&mut want),
                (Block::Moe(b), Block::Moe(whole)) => {
                    let s = &b.shape;
                    for row in want.chunks_exact_mut(n_embd) {
                        let h = math::rms_norm(row, &b.ffn_norm, s.rms_eps);
                        for (i, (expert, weight)) in whole.route(&h).into_iter().enumerate() {
                            let is_last = i + 1 == s.n_used; // the home computes it, whatever it is
                            ids.push(expert as u32 | if is_last { ELSEWHERE } else { 0 });
                            weights.push(weight as f32);
                            if is_last || !part.contains(&expert) {
                                continue;
                            }
                            let e = expert - part.start;
                            let up = b.ffn_up_exps.apply_stacked(e, s.n_ff, &h);
                            let mut y = b.ffn_gate_exps.apply_stacked(e, s.n_ff, &h);
                            y.iter_mut().zip(up).for_each(|(g, u)| *g = math::silu(*g) * u);
                            let y = b.ffn_down_exps.apply_stacked(e, n_embd, &y);
                            row.iter_mut().zip(y).for_each(|(x, y)| *x += weight * y);
                        }
                    }
                }
                _ => unreachable!("feed-forward blocks"),
            }
            want.iter_mut().zip(&x).for_each(|(w, x)| *w -= f64::from(*x));
            for (isa, n_workers) in isas().into_iter().flat_map(|isa| [(isa, 2), (isa, 7)]) {
                let backend = load(&model, &source, isa, n_workers);
                let mut state = backend.state(size(&case)).expect("memory");
                let (mut stream, mut sum) = (x.clone(), Poisoned::new(x.len()));
                let memory = Memory {
                    x: stream.as_mut_ptr(),
                    sum: sum.out().as_mut_ptr(),
                    len: n_tokens * n_embd,
                    ids: ids.as_ptr(),
                    weights: weights.as_ptr(),
                    n_choices: ids.len(),
                };
                let (posted, looks) = (AtomicUsize::new(0), AtomicUsize::new(0));
                let desk = Desk { memory, posted, looks, gives_up_at: 1 };
                let tasks = [Task { blocks: 0..1, is_share: true }, Task { blocks: 0..1, is_share: true }];
                assert!(backend.serve(&tasks[..1], &batch, &mut state, &desk, &mut []).unwrap());
                let error = relative_rms_of_rows(sum.checked(), &want, n_embd);
                assert!(error <= bound(&case), "{} on {}: {error:e}", case.name, isa.name());
                assert!(
                    n_tokens > 1 || desk.looks.load(Ordering::Relaxed) > 0,
                    "{}: nothing was read ahead",
                    case.name
                );
                assert_eq!(stream, x, "{}: the residual stream is not the share's", case.name);
                desk.posted.store(0, Ordering::Relaxed);
                desk.looks.store(0, Ordering::Relaxed);
                assert!(!backend.serve(&tasks, &batch, &mut state, &desk, &mut []).unwrap(), "it gave up");
                n_checked += 1;
            }
        }
    }
    assert!(n_checked > 10, "only {n_checked} shares");
}

/// A desk at which a worker panics.
struct Broken(Memory);

// SAFETY: as for the desk.
unsafe impl Sync for Broken {}

// SAFETY: as for the desk.
unsafe impl Handoff for Broken {
    fn memory(&self) -> Memory {
        self.0
    }

    fn wait(&self, task: usize) -> bool {
        assert!(task == 0, "broken on purpose");
        true
    }

    fn post(&self, _: usize) {}
}

/// A worker that panics in the middle ends the step with an error for everyone, and the next step works.
#[test]
fn a_panicking_worker_ends_the_step() {
    let case = cases().into_iter().find(|c| matches!(c.shape, Shape::Ffn(_))).expect("a case");
    let (block, source) = case.block();
    let backend = load(&model(&case, block), &source, Isa::Portable, 3);
    let mut state = backend.state(size(&case)).expect("memory");
    let (batch, mut x) = case.inputs().into_iter().next().expect("an input");
    let mut sum = vec![0.0; x.len()];
    let (x, sum, len) = (x.as_mut_ptr(), sum.as_mut_ptr(), x.len());
    let broken = Broken(Memory { x, sum, len, ids: std::ptr::null(), weights: std::ptr::null(), n_choices: 0 });
    let tasks = [(); 4].map(|()| Task { blocks: 0..1, is_share: true });
    let error = backend.serve(&tasks, &batch, &mut state, &broken, &mut []).unwrap_err();
    assert!(matches!(&error, Error::Worker(why) if why.contains("broken on purpose")), "{error}");
    assert!(backend.serve(&tasks[..1], &batch, &mut state, &broken, &mut []).unwrap());
}
