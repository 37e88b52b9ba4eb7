//! On a GPU: every block against the exact reference, for every case of the table.

use crate::gpu::gpu;
use std::sync::Arc;
use tandem_cuda::{Backend, Compiler, Device, Options, PROMPT_FROM};
use tandem_spec::testing::{Buffers, Case, Poisoned, Shape, cases, relative_rms_of_rows};
use tandem_spec::{Block, KvDtype, TensorType, Weight};

pub fn options(case: &Case) -> Options {
    let tokens =
        |f: &dyn Fn(usize) -> bool| case.steps.iter().flatten().filter(|run| f(run.0)).map(|run| run.1).sum::<usize>();
    let n_batch = case.steps.iter().map(|runs| runs.iter().map(|run| run.1).sum()).max().unwrap_or(1);
    let n_ctx = (0..case.n_slots).map(|slot| tokens(&|s| s == slot)).max().unwrap_or(1);
    Options { n_slots: case.n_slots, n_ctx, n_batch, kv: case.kv_dtype }
}

/// Largest normalised error of any row over the steps of a case, whose block, or a share of it, is `block`; the prompt
/// kernels take batches of `prompt_from` tokens and more.
pub fn error_of(
    case: &Case,
    (block, source): (Block<Weight>, Buffers),
    expected: &[Vec<f64>],
    device: &Arc<Device>,
    compiler: Compiler,
    prompt_from: usize,
) -> f64 {
    let blocks = [block];
    let backend = Backend::load(device, compiler, &blocks, &source, &options(case), &mut |_, _| {})
        .unwrap_or_else(|e| panic!("{}: {e}", case.name))
        .with_prompt_from(prompt_from);
    let mut state = backend.state().unwrap_or_else(|e| panic!("{}: {e}", case.name));
    let mut worst = 0.0f64;
    for ((batch, before), want) in case.inputs().iter().zip(expected) {
        let mut x = before.clone();
        let n_logits = if matches!(case.shape, Shape::Head(_)) { want.len() } else { 0 };
        let mut logits = Poisoned::new(n_logits);
        if matches!(case.shape, Shape::Embed { .. }) {
            x.fill(f32::NAN);
        }
        backend.run(&mut state, 0..1, batch, &mut x, logits.out()).unwrap_or_else(|e| panic!("{}: {e}", case.name));
        let error = match case.shape {
            Shape::Head(_) => relative_rms_of_rows(logits.checked(), want, case.n_vocab()),
            Shape::Embed { .. } => relative_rms_of_rows(&x, want, case.n_embd()),
            _ => {
                let added: Vec<f32> = x.iter().zip(before).map(|(x, b)| x - b).collect();
                relative_rms_of_rows(&added, want, case.n_embd())
            }
        };
        worst = worst.max(error);
    }
    worst
}

/// Float weights meet float activations; the rest is rounding of f32 sums and of the chip's own exp and log.
const BOUND_FLOAT: f64 = 2e-5;
/// The prompt kernels round activations to 16 bits (8 of them mantissa for BF16) before 16-bit weights, and queries and
/// weights of keys before a bf16 cache.
const BOUND_HALF: f64 = 1e-2;
/// Quantised weights meet one token's activations of 8 bits with a scale per 32, several tokens' of bf16: a product
/// adds up to a percent, and the worst row of the worst case has three.
const BOUND_QUANTISED: f64 = 0.035;
/// The gated norm enlarges the rounding of rows whose delta-net output is small.
const BOUND_DELTA_NET: f64 = 0.08;

/// Compiles what `cases` need on all cores, into the cache.
pub fn compile(cases: &[Case], device: &Device, compiler: &Compiler) {
    let programs: Vec<_> = cases
        .iter()
        .flat_map(|case| {
            tandem_cuda::programs(&[case.block().0], &options(case), device.n_sms(), device.products()).unwrap()
        })
        .collect();
    let (major, minor) = device.compute_capability();
    compiler.cubins(&programs, &format!("sm_{major}{minor}")).unwrap_or_else(|e| panic!("{e}"));
}

/// Runs the cases of a kind: references and compilations on all cores, then case after case on the GPU.
fn check(kind: &str) {
    let Some((device, compiler)) = gpu() else { return };
    let cases: Vec<Case> = cases().into_iter().filter(|case| case.name.starts_with(kind)).collect();
    assert!(!cases.is_empty());
    let next = std::sync::atomic::AtomicUsize::new(0);
    let expected = std::sync::Mutex::new(vec![Vec::new(); cases.len()]);
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, |n| n.get()) {
            scope.spawn(|| {
                loop {
                    let i = next.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                    let Some(case) = cases.get(i) else { return };
                    let (block, source) = case.block();
                    let want = case.expected(&block, &source, &case.inputs());
                    expected.lock().unwrap()[i] = want;
                }
            });
        }
    });
    compile(&cases, &device, &compiler());
    let mut failed = Vec::new();
    for (case, expected) in cases.iter().zip(expected.into_inner().unwrap()) {
        let quantised = case.types.iter().any(|ty| ty.is_quantised());
        let is_half = case.types.iter().any(|ty| matches!(ty, TensorType::F16 | TensorType::BF16));
        let is_embed = matches!(case.shape, Shape::Embed { .. });
        let bound = match case.shape {
            _ if is_half && !quantised && !is_embed => BOUND_HALF,
            _ if !quantised && case.kv_dtype == KvDtype::Bf16 => BOUND_HALF,
            _ if !quantised || is_embed => BOUND_FLOAT,
            Shape::DeltaNet(_) => BOUND_DELTA_NET,
            _ => BOUND_QUANTISED,
        };
        let error = error_of(case, case.block(), &expected, &device, compiler(), usize::MAX);
        println!("{:40} {error:.2e}{}", case.name, if error <= bound { "" } else { "  FAILED" });
        if error.is_nan() || error > bound {
            failed.push(format!("{}: {error:.2e} over {bound:.0e}", case.name));
        }
    }
    assert!(failed.is_empty(), "{failed:#?}");
}

#[test]
fn embed_agrees_with_the_reference() {
    check("embed");
}

#[test]
fn attention_agrees_with_the_reference() {
    check("attention");
}

#[test]
fn delta_net_agrees_with_the_reference() {
    check("delta_net");
}

#[test]
fn ffn_agrees_with_the_reference() {
    check("ffn");
}

#[test]
fn moe_agrees_with_the_reference() {
    check("moe");
}

/// A GPU that holds some experts adds these and the shared one, in both sets of kernels.
#[test]
fn shares_of_mixtures_agree_with_the_reference() {
    let Some((device, compiler)) = gpu() else { return };
    let all = cases();
    for name in ["moe odd", "moe awkward", "moe F16", "moe Q6_K", "moe MXFP4", "moe 256 of 8", "moe 35B"] {
        let case = all.iter().find(|c| c.name == name).unwrap_or_else(|| panic!("no case {name}"));
        let Shape::Moe(shape) = &case.shape else { unreachable!("{name} is a mixture") };
        let bound = if case.types == [TensorType::F32] { BOUND_FLOAT } else { BOUND_QUANTISED };
        for part in [0..shape.n_experts / 2, shape.n_experts / 3..shape.n_experts, 0..0] {
            for prompt_from in [1, PROMPT_FROM, usize::MAX] {
                let (block, source) = case.block();
                let share = block.share(part.clone(), true);
                let expected = case.expected(&share, &source, &case.inputs());
                let error = error_of(case, (share, source), &expected, &device, compiler(), prompt_from);
                println!("{name:20} experts {part:?} from {prompt_from:20} {error:.2e}");
                assert!(error <= bound, "{name}: {error:.2e} over {bound:.0e}, experts {part:?}");
            }
        }
    }
}

#[test]
fn head_agrees_with_the_reference() {
    check("head");
}
