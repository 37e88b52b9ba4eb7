//! The bundled model tells a story, remembers it in the next turn, and a session computes only what is new.

use tandem::engine::{DeviceOptions, Engine, Session};
use tandem::gguf::File;
use tandem::plan::{Device, Workload};
use tandem::text::{ChatTemplate, Message, RenderOptions, Tokenizer, Vocabulary};

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

/// The tokens of the owl's story as a chat.
pub fn owl(file: &File, tokenizer: &Tokenizer) -> Vec<u32> {
    let template = ChatTemplate::from_metadata(file.metadata(), tokenizer).unwrap().expect("it has a template");
    let messages = [Message::new("user", "Tell me a story about an owl named Ravi.")];
    tokenizer.encode_prompt(&template.render(&messages, &RenderOptions::default()).unwrap(), true)
}

#[test]
fn a_second_turn_knows_the_first() {
    let file = File::open(concat!(env!("CARGO_MANIFEST_DIR"), "/models/story-q4_k_m.gguf")).unwrap();
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
