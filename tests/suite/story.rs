//! The bundled model tells a story, remembers it in the next turn, and a session computes only what is new.

use tandem::engine::{DeviceOptions, Engine, Session};
use tandem::gguf::File;
use tandem::plan::{Device, Workload};
use tandem::text::{ChatTemplate, Message, RenderOptions, Tokenizer, Vocabulary};
use tandem_spec::{Model, Tensor, TensorSource, TensorType, Weight};

/// The bundled model.
pub fn story() -> File {
    File::open(concat!(env!("CARGO_MANIFEST_DIR"), "/models/story-q4_k_m.gguf")).unwrap()
}

/// Weights of a model in another type.
#[derive(Default)]
pub struct Weights(Vec<Vec<u8>>);

impl TensorSource for Weights {
    fn bytes(&self, tensor: usize) -> &[u8] {
        &self.0[tensor]
    }
}

/// The bytes of `values` in `ty`: F32, BF16, or Q8_0 for rows of whole blocks.
fn encode(values: &[f32], ty: TensorType) -> Vec<u8> {
    match ty {
        TensorType::F32 => values.iter().flat_map(|x| x.to_le_bytes()).collect(),
        TensorType::BF16 => values.iter().flat_map(|x| half::bf16::from_f32(*x).to_le_bytes()).collect(),
        TensorType::Q8_0 => values
            .chunks(32)
            .flat_map(|block| {
                let scale = half::f16::from_f32(block.iter().fold(0f32, |max, x| max.max(x.abs())) / 127.0);
                let inverse = if scale.to_f32() > 0.0 { 1.0 / scale.to_f32() } else { 0.0 };
                let codes = block.iter().map(move |x| (x * inverse).round() as i8 as u8);
                scale.to_le_bytes().into_iter().chain(codes)
            })
            .collect(),
        _ => unreachable!("a type of these tests"),
    }
}

/// The same model with its quantised weights in `ty`, and those that are floats in f32.
pub fn in_type(model: &Model, source: &dyn TensorSource, ty: TensorType) -> (Model, Weights) {
    let mut weights = Weights::default();
    let mut blocks = Vec::new();
    for block in &model.blocks {
        let block = block.try_map(&mut |w: &Weight| {
            let ty = if w.ty.is_quantised() { ty } else { TensorType::F32 };
            let tensor = Tensor { name: w.name.clone(), ty, ne: vec![w.n_cols, w.n_rows()] };
            weights.0.push(encode(&w.decode(source), ty));
            Ok::<_, std::convert::Infallible>(Weight::whole(weights.0.len() - 1, &tensor))
        });
        blocks.push(block.unwrap());
    }
    (Model { blocks, mtp: None, ..model.clone() }, weights)
}

fn engine(file: &File) -> Engine {
    let model = tandem::model::describe(file).unwrap();
    let machine = tandem::machine::here(&tandem::machine::Options::default());
    let wishes = tandem::plan::Wishes { vram: vec![0; 16], workload: Workload::default(), ..Default::default() };
    let plan = tandem::plan::plan(&model, &machine, &wishes).unwrap();
    assert_eq!(plan.devices(), [Device::Cpu]);
    let options = DeviceOptions { isa: tandem_cpu::Isa::detect(), cuda_libs: None, cubin_cache: None };
    Engine::load(model, plan, &options, file, &|_| {}).unwrap()
}

/// The most likely continuation of `prefix`, until the model ends it.
pub fn greedy(session: &mut Session, tokenizer: &Tokenizer, prefix: &mut Vec<u32>) -> (usize, String) {
    let (start, mut n_new) = (prefix.len(), 0);
    loop {
        let n = session.feed(prefix, &|| false).unwrap();
        n_new += if prefix.len() == start { n } else { 0 };
        let logits = session.logits();
        let best = (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b])).unwrap() as u32;
        if tokenizer.ends_generation(best) {
            break (n_new, String::from_utf8(tokenizer.decode(&prefix[start..])).unwrap());
        }
        prefix.push(best);
        assert!(prefix.len() < 2000, "the story never ends");
    }
}

/// The tokens of a chat that begins with `question`.
pub fn asked(file: &File, tokenizer: &Tokenizer, question: &str) -> Vec<u32> {
    let template = ChatTemplate::from_metadata(file.metadata(), tokenizer).unwrap().expect("it has a template");
    let rendered = template.render(&[Message::new("user", question)], &RenderOptions::default());
    tokenizer.encode_prompt(&rendered.unwrap(), true)
}

/// The tokens of the owl's story as a chat.
pub fn owl(file: &File, tokenizer: &Tokenizer) -> Vec<u32> {
    asked(file, tokenizer, "Tell me a story about an owl named Ravi.")
}

#[test]
fn a_second_turn_knows_the_first() {
    let file = story();
    second_turn_knows_the_first(&file, &engine(&file));
}

/// Two turns of a chat over `engine`, which has the story model of `file`.
pub fn second_turn_knows_the_first(file: &File, engine: &Engine) {
    let tokenizer = Tokenizer::new(Vocabulary::from_metadata(file.metadata()).unwrap()).unwrap();
    let template = ChatTemplate::from_metadata(file.metadata(), &tokenizer).unwrap().expect("it has a template");
    let mut session = Session::for_chat(engine).unwrap();
    let mut messages = vec![Message::new("user", "Tell me a story about an owl named Ravi.")];
    let tokens = |messages: &[Message]| {
        tokenizer.encode_prompt(&template.render(messages, &RenderOptions::default()).unwrap(), true)
    };

    let mut prefix = tokens(&messages);
    let (_, story) = greedy(&mut session, &tokenizer, &mut prefix);
    assert!(story.contains("owl") && story.contains("Ravi"), "{story}");
    let friend = story.split("named ").nth(1).and_then(|rest| rest.split(['.', ',', ' ']).next()).expect("a friend");

    let n_story = prefix.len();
    messages.extend([Message::new("assistant", &story), Message::new("user", "Who was Ravi's friend?")]);
    let mut prefix = tokens(&messages);
    let n_prompt = prefix.len();
    let (n_new, answer) = greedy(&mut session, &tokenizer, &mut prefix);
    assert!(answer.contains(friend), "{friend} is not in {answer:?}; the story was {story:?}");
    assert!(n_new < n_prompt - n_story / 2, "computed {n_new} of {n_prompt} tokens, {n_story} being known");

    // From scratch the second turn is the same: nothing of the first is left but what the prefix says.
    let mut fresh = Session::new(engine).unwrap();
    let mut again = prefix[..n_prompt].to_vec();
    assert_eq!(greedy(&mut fresh, &tokenizer, &mut again).1, answer);
}
