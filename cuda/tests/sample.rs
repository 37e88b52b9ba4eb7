//! On a GPU: the choice of tokens against the reference on the same logits, and what a step
//! costs in driver calls.

use crate::gpu::gpu;
use tandem_cuda::{Backend, Error, Feed, Options, driver_calls};
use tandem_spec::testing::{Buffers, Rng};
use tandem_spec::{Block, Embed, Head, HeadShape, KvDtype, Linear, SamplerOptions, TensorType, Weight};

fn add(source: &mut Buffers, name: &str, n_rows: usize, value: impl Fn(usize) -> f32) -> Weight {
    let bytes = (0..n_rows * WIDTH).flat_map(|i| value(i).to_le_bytes()).collect();
    source.add(name, TensorType::F32, &[WIDTH, n_rows], bytes)
}

const WIDTH: usize = 32;

/// A model of an embedding and a head that gives `logits` (times a number near one) after any token.
fn constant(logits: &[f32]) -> (Vec<Block<Weight>>, Buffers) {
    let (n_vocab, mut source) = (logits.len(), Buffers::default());
    let first = |i: usize| if i.is_multiple_of(WIDTH) { 1.0 } else { 0.0 };
    let token_embd = add(&mut source, "token_embd", n_vocab, first);
    let output_norm = add(&mut source, "output_norm", 1, |_| 1.0 / (WIDTH as f32).sqrt());
    let output = add(&mut source, "output", n_vocab, |i| if i.is_multiple_of(WIDTH) { logits[i / WIDTH] } else { 0.0 });
    let shape = HeadShape { n_embd: WIDTH, n_vocab, rms_eps: 0.0 };
    let output = Linear { weight: output, scale: None, bias: None };
    let blocks = vec![
        Block::Embed(Embed { n_embd: WIDTH, n_vocab, token_embd }),
        Block::Head(Head { shape, output_norm, output }),
    ];
    (blocks, source)
}

/// Noise as models give it, and what is hard to choose from: all equal, the largest side by side, most impossible,
/// pairs.
fn patterns(n_vocab: usize, rng: &mut Rng) -> Vec<(&'static str, Vec<f32>)> {
    let noise: Vec<f32> = (0..n_vocab).map(|_| (0..4).map(|_| rng.uniform(-4.0, 4.0)).sum::<f64>() as f32).collect();
    let sorted = |noise: &[f32]| {
        let mut sorted = noise.to_vec();
        sorted.sort_by(|a, b| b.total_cmp(a));
        sorted
    };
    let near = noise.iter().map(|x| x * 1e-3).collect();
    let impossible = |i: usize| if i % 97 == 3 || i + 1 == n_vocab { noise[i] } else { f32::NEG_INFINITY };
    vec![
        ("equal", vec![1.5; n_vocab]),
        ("zeros", (0..n_vocab).map(|i| if i % 3 == 0 { 0.0 } else { -0.0 }).collect()),
        ("sorted", sorted(&noise)),
        ("pairs", noise.iter().map(|x| (x * 2.0).round() / 2.0).collect()),
        ("few", (0..n_vocab).map(impossible).collect()),
        ("near", near),
        ("noise", noise),
    ]
}

fn samplers(n_vocab: usize, rng: &mut Rng) -> Vec<SamplerOptions> {
    let mut pick = |of: &[f32]| of[rng.below(of.len())];
    let mut all = vec![SamplerOptions::greedy(), SamplerOptions::default()];
    for seed in 0..10 {
        all.push(SamplerOptions {
            temperature: pick(&[0.0, 0.3, 1.0, 2.5, 100.0]),
            top_k: pick(&[1.0, 2.0, 5.0, 40.0, 255.0, 256.0]) as usize,
            top_p: pick(&[1.0, 0.95, 0.5, 1e-20]),
            min_p: pick(&[0.0, 0.05, 0.7, 1.0]),
            repeat_penalty: pick(&[1.0, 1.3, 0.7]),
            presence_penalty: pick(&[0.0, 0.5]),
            frequency_penalty: pick(&[0.0, 0.2, -0.1]),
            penalty_window: pick(&[0.0, 1.0, 7.0, 64.0, 1024.0]) as usize,
            seed: seed + n_vocab as u64,
        });
    }
    all
}

/// Two sequences in one step, each with its own sampler, for some tokens: every token is the reference's.
fn check(backend: &Backend, n_vocab: usize, what: &str, rng: &mut Rng) -> usize {
    let mut state = backend.state().unwrap();
    let mut n_checked = 0;
    for pair in samplers(n_vocab, rng).chunks(2) {
        // A history before the first step, of likely and of arbitrary tokens.
        let mut prefixes: Vec<Vec<u32>> =
            (0..2).map(|_| (0..1 + rng.below(90)).map(|_| rng.below(n_vocab.min(50)) as u32).collect()).collect();
        for _ in 0..12 {
            let feed =
                |slot: usize| Feed { slot, position: prefixes[slot].len() - 1, token: *prefixes[slot].last().unwrap() };
            let feeds = [feed(0), feed(1)];
            let how = [(&pair[0], &prefixes[0][..]), (&pair[1], &prefixes[1][..])];
            backend.launch(&mut state, &feeds, &how).unwrap();
            let tokens = backend.wait(&mut state).unwrap();
            let mut logits = vec![f32::NAN; 2 * n_vocab];
            backend.logits(&state, &mut logits).unwrap();
            for (slot, token) in tokens.into_iter().enumerate() {
                let want = pair[slot].choose(&logits[slot * n_vocab..(slot + 1) * n_vocab], &prefixes[slot]);
                assert_eq!(Some(token), want, "{what} of {n_vocab} at {}: {:?}", prefixes[slot].len(), pair[slot]);
                prefixes[slot].push(token);
                n_checked += 1;
            }
        }
    }
    n_checked
}

#[test]
fn chosen_tokens_are_those_of_the_reference() {
    let Some((device, compiler)) = gpu() else { return };
    let options = Options { n_slots: 2, n_ctx: 200, n_batch: 2, kv: KvDtype::F32 };
    let mut rng = Rng::new(11);
    let mut n_checked = 0;
    for n_vocab in [1, 2, 31, 33, 257, 1031, 8193, 32003, 248320, 262147] {
        for (what, logits) in patterns(n_vocab, &mut rng) {
            let (blocks, source) = constant(&logits);
            let backend = Backend::load(&device, compiler(), &blocks, &source, &options, &mut |_, _| {}).unwrap();
            n_checked += check(&backend, n_vocab, what, &mut rng);
        }
    }
    assert!(n_checked > 5000, "{n_checked}");
}

#[test]
fn unusable_logits_are_an_error() {
    let Some((device, compiler)) = gpu() else { return };
    let options = Options { n_slots: 2, n_ctx: 200, n_batch: 2, kv: KvDtype::F32 };
    for bad in [f32::NAN, -f32::NAN, f32::INFINITY] {
        let mut logits = vec![0.5; 1031];
        logits[1030] = bad;
        let (blocks, source) = constant(&logits);
        let backend = Backend::load(&device, compiler(), &blocks, &source, &options, &mut |_, _| {}).unwrap();
        let mut state = backend.state().unwrap();
        for sampler in [SamplerOptions::greedy(), SamplerOptions::default()] {
            backend.launch(&mut state, &[Feed { slot: 1, position: 0, token: 1 }], &[(&sampler, &[1])]).unwrap();
            let error = backend.wait(&mut state).unwrap_err();
            assert!(matches!(error, Error::Logits { slot: 1 }), "{bad}: {error}");
        }
    }
}

/// After the first step a token costs two driver calls: the launch of the graph and the wait for its 4 bytes.
#[test]
fn a_token_is_one_launch_and_one_read() {
    let Some((device, compiler)) = gpu() else { return };
    let options = Options { n_slots: 2, n_ctx: 200, n_batch: 2, kv: KvDtype::F32 };
    let (_, logits) = patterns(8193, &mut Rng::new(3)).pop().expect("noise");
    let (blocks, source) = constant(&logits);
    let backend = Backend::load(&device, compiler(), &blocks, &source, &options, &mut |_, _| {}).unwrap();
    let mut state = backend.state().unwrap();
    for sampler in [
        SamplerOptions::greedy(),
        SamplerOptions::default(),
        SamplerOptions { repeat_penalty: 1.1, ..Default::default() },
    ] {
        let mut tokens = vec![7];
        let mut step = || {
            let feed = Feed { slot: 0, position: tokens.len() - 1, token: tokens[tokens.len() - 1] };
            backend.launch(&mut state, &[feed], &[(&sampler, &tokens)]).unwrap();
            tokens.push(backend.wait(&mut state).unwrap()[0]);
        };
        step();
        let before = driver_calls();
        (0..100).for_each(|_| step());
        assert_eq!(driver_calls() - before, 200, "{sampler:?}");
        assert!(backend.busy_seconds(&state).unwrap() > 0.0);
    }
}
