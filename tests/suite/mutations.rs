//! Ten thousand seeded mutations of the golden files: none panics, and whatever is still accepted can be computed with.

use super::files::golden;
use tandem::gguf::File;
use tandem::model::describe;
use tandem::text::{Tokenizer, Vocabulary};
use tandem_cpu::{Backend, Error, Isa, Options, StateSize};
use tandem_spec::{Batch, DeltaForm, KvDtype, Model, Reference};

const MUTATIONS: u64 = 10_000;
/// One in this many accepted files is computed with, which takes longer than reading it.
const COMPUTED: u64 = 16;

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }
}

/// Numbers that sizes and positions go wrong with.
const AWKWARD: [u64; 14] =
    [0, 1, 2, 3, 8, 31, 0x7f, 0xff, 0xffff, 0x7fff_ffff, 0xffff_ffff, 1 << 60, i64::MAX as u64, u64::MAX];

/// Where the metadata and the tensor table begin that are worth changing: everything but the vocabulary's texts.
fn interesting(bytes: &[u8], header: usize) -> Vec<usize> {
    let find = |what: &[u8]| bytes[..header].windows(what.len()).position(|w| w == what).unwrap_or(header);
    let (from, to) = (find(b"tokenizer.ggml.tokens") + 64, find(b"tokenizer.ggml.bos_token_id"));
    (0..header).filter(|at| !(from..to).contains(at)).collect()
}

/// `bytes` with one to three changes, mostly in the header `[0, header)`.
fn mutated(bytes: &[u8], places: &[usize], random: &mut Random) -> Vec<u8> {
    let mut out = bytes.to_vec();
    for _ in 0..=random.below(3) {
        let at = match random.below(10) {
            0 => random.below(out.len()),
            _ => places[random.below(places.len())].min(out.len() - 1),
        };
        match random.below(8) {
            0 | 1 => out[at] ^= 1 << random.below(8),
            2 => out[at] = random.next() as u8,
            3 => out[at] = out[at].wrapping_add(1),
            kind @ 4..=6 => {
                let value = AWKWARD[random.below(AWKWARD.len())].to_le_bytes();
                let n = [1, 4, 8][kind - 4].min(out.len() - at);
                out[at..at + n].copy_from_slice(&value[..n]);
            }
            _ if random.below(4) == 0 => out.truncate(at.max(1)),
            _ => {
                let from = places[random.below(places.len())].min(out.len() - 1);
                let n = (1 + random.below(32)).min(out.len() - at.max(from));
                out.copy_within(from..from + n, at);
            }
        }
    }
    out
}

/// Computes the logits of two tokens, as the reference does and with the CPU kernels. Non-finite weights may give
/// non-finite logits. A file may ask for what the kernels lack; they then say so.
fn compute(model: &Model, file: &File) -> bool {
    let batch = Batch::single(0, 0, &[0, (model.n_vocab - 1) as u32], false);
    let mut reference = Reference::new(model, file, 1, KvDtype::F32, DeltaForm::Recurrent);
    assert_eq!(reference.step(&batch).logits.len(), model.n_vocab);

    let blocks: Vec<usize> = (0..model.blocks.len()).collect();
    let options = Options { threads: 1, isa: Isa::detect() };
    let backend = match Backend::load(model, &blocks, file, options, &|_| {}) {
        Ok(backend) => backend,
        Err(error) => {
            assert!(matches!(error, Error::Unsupported(_)), "{error}");
            return false;
        }
    };
    let size = StateSize { n_slots: 1, n_ctx: 2, n_batch: 2, kv_dtype: KvDtype::F32 };
    let mut state = backend.state(size).expect("memory for the states of a tiny model");
    let (mut x, mut logits) = (vec![f32::NAN; 2 * model.n_embd], vec![f32::NAN; model.n_vocab]);
    backend.run(0..model.blocks.len(), &batch, &mut state, &mut x, &mut logits).expect("a step");
    true
}

#[test]
fn mutated_files_are_refused_or_safe_to_compute_with() {
    let originals: Vec<_> = golden()
        .iter()
        .map(|path| {
            let bytes = std::fs::read(path).unwrap();
            let file = File::open(path).unwrap();
            let header = bytes.len() - file.tensors().iter().map(|t| t.n_bytes().next_multiple_of(32)).sum::<usize>();
            let places = interesting(&bytes, header);
            (bytes, places)
        })
        .collect();
    let mut random = Random(20);
    let (mut opened, mut described, mut computed) = (0u64, 0u64, 0u64);
    for n in 0..MUTATIONS {
        let (bytes, places) = &originals[random.below(originals.len())];
        let bytes = mutated(bytes, places, &mut random);
        let file = match File::from_bytes(bytes, "mutated") {
            Ok(file) => file,
            Err(error) => {
                assert!(error.to_string().starts_with("mutated: "), "mutation {n}: {error}");
                continue;
            }
        };
        opened += 1;
        if opened.is_multiple_of(COMPUTED)
            && let Ok(tokenizer) = Vocabulary::from_metadata(file.metadata()).and_then(Tokenizer::new)
        {
            assert!(tokenizer.encode("Ravi's owl, 42", true).iter().all(|id| (*id as usize) < tokenizer.n_vocab()));
        }
        if let Ok(model) = describe(&file) {
            described += 1;
            if described.is_multiple_of(COMPUTED) {
                computed += u64::from(compute(&model, &file));
            }
        }
    }
    // The mutations are neither all harmless nor all fatal.
    assert!(opened > MUTATIONS / 10 && opened < MUTATIONS, "{opened} of {MUTATIONS} were opened");
    assert!(described > 100 && computed > 10 && described < opened, "{described} were described, {computed} computed");
}
