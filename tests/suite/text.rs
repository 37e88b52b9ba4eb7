use std::path::{Path, PathBuf};

use proptest::prelude::*;
use serde_json::Value;
use tandem::gguf::File;
use tandem::text::{Tokenizer, Vocabulary};

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

fn tokenizer(path: impl AsRef<Path>) -> Tokenizer {
    let file = File::open(path).unwrap();
    Tokenizer::new(Vocabulary::from_metadata(file.metadata()).unwrap()).unwrap()
}

fn story() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("models/story-q4_k_m.gguf")
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

#[test]
fn golden_texts_give_the_golden_tokens() {
    let manifest: Value = serde_json::from_str(&std::fs::read_to_string(golden("tokenizers.json")).unwrap()).unwrap();
    let mut texts = 0;
    for entry in manifest["tokenizers"].as_array().unwrap() {
        let name = entry["model"].as_str().unwrap();
        let tokenizer = tokenizer(golden(name));
        assert_eq!(tokenizer.end_of_generation(), ids(&entry["eog"]), "{name}");
        for case in entry["cases"].as_array().unwrap() {
            let text = case["text"].as_str().unwrap();
            let with_control = tokenizer.encode(text, true);
            assert_eq!(with_control, ids(&case["ids"]), "{name}: {text:?}");
            assert_eq!(tokenizer.encode(text, false), ids(&case["ids_without_control_tokens"]), "{name}: {text:?}");
            assert_eq!(tokenizer.decode(&with_control), text.as_bytes(), "{name}");
            texts += 1;
        }
    }
    assert_eq!(texts, 171);
}

#[test]
fn the_story_model_tokenizes_as_in_llama_cpp() {
    let tokenizer = tokenizer(story());
    let text = "Zwölf Äpfel, 日本語 and  two   spaces";
    let expected = [
        57, 86, 127, 114, 75, 69, 220, 127, 226, 79, 69, 394, 11, 220, 162, 245, 98, 162, 250, 105, 164, 103, 252, 269,
        220, 635, 220, 220, 260, 79, 64, 66, 298,
    ];
    assert_eq!(tokenizer.encode(text, false), expected);
    let text = "Once upon a time there was a little fox named Mia.";
    assert_eq!(tokenizer.encode(text, false), [681, 682, 258, 412, 473, 270, 258, 991, 1031, 346, 545, 13]);
    assert_eq!(tokenizer.end_of_generation(), [1307, 1309]);
    assert_eq!(tokenizer.piece(1309, false), b"");
    assert_eq!(tokenizer.piece(1309, true), b"<|im_end|>");
    assert_eq!(tokenizer.piece(99_999, true), b"");
}

/// A SentencePiece-style vocabulary: all bytes, some letters and words with scores.
fn scored() -> Vocabulary {
    let mut tokens = vec!["<unk>".to_owned(), "<s>".into(), "</s>".into()];
    let mut token_types = vec![2, 3, 3];
    let mut scores = vec![0.0; 3];
    for byte in 0..=255u8 {
        tokens.push(format!("<0x{byte:02X}>"));
        token_types.push(6);
        scores.push(0.0);
    }
    let words = ["▁", "a", "b", "c", "▁a", "ab", "bc", "abc", "▁abc", "<think>", "é"];
    let of_words = [-9.0, -9.0, -9.0, -9.0, -3.0, -2.0, -2.0, -5.0, -6.0, 0.0, -9.0];
    tokens.extend(words.map(str::to_owned));
    token_types.extend(words.map(|word| if word == "<think>" { 4 } else { 1 }));
    scores.extend(of_words);
    Vocabulary { file: "scored".into(), model: "llama".into(), tokens, token_types, scores, ..Vocabulary::default() }
}

#[test]
fn scores_decide_merges_and_ties_go_left() {
    let vocabulary = scored();
    let texts = vocabulary.tokens.clone();
    let tokenizer = Tokenizer::new(vocabulary).unwrap();
    let pieces = |text: &str, control| -> Vec<String> {
        tokenizer.encode(text, control).iter().map(|&id| texts[id as usize].clone()).collect()
    };
    // "ab" and "bc" score the same: the left one is merged, and then "abc" with the space.
    assert_eq!(pieces("abc", false), ["▁abc"]);
    assert_eq!(pieces("abcb", false), ["▁abc", "b"]);
    // "▁a" would score less than "ab".
    assert_eq!(pieces("ab", false), ["▁", "ab"]);
    assert_eq!(pieces("a  b", false), ["▁a", "▁", "▁", "b"]);
    // No token for these: their bytes.
    assert_eq!(pieces("aß", false), ["▁a", "<0xC3>", "<0x9F>"]);
    // The name of a byte token is ordinary text.
    assert_eq!(pieces("<0x41>", false).len(), 7);
    assert_eq!(pieces("a</s>b", false)[..3], ["▁a", "<0x3C>", "<0x2F>"]);
    assert_eq!(pieces("a</s>b", true), ["▁a", "</s>", "▁", "b"]);
    assert_eq!(pieces("a<think>b", false), ["▁a", "<think>", "▁", "b"]);
    assert_eq!(tokenizer.decode(&tokenizer.encode("a<think>b", false)), b"a<think>b");
    assert_eq!(tokenizer.encode_prompt("a", false)[0], 1);
    assert_eq!(tokenizer.encode_prompt("<s>a", true).iter().filter(|id| **id == 1).count(), 1);
    assert_eq!(tokenizer.end_of_generation(), [2]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn any_text_comes_back(text in "(\\PC|[\\s\u{0}-\u{ff}<|>]|abc|<think>|<\\|im_end\\|>){0,60}") {
        for name in ["tokenizer-qwen2.gguf", "tokenizer-qwen35.gguf", "tokenizer-llama-bpe.gguf"] {
            let tokenizer = cached(name);
            for control in [false, true] {
                let ids = tokenizer.encode(&text, control);
                prop_assert_eq!(tokenizer.decode(&ids), text.as_bytes());
            }
        }
        // U+2581 is a space in such vocabularies.
        let text = text.replace('\u{2581}', " ");
        let tokenizer = cached("scored");
        prop_assert_eq!(tokenizer.decode(&tokenizer.encode(&text, true)), text.as_bytes());
    }
}

fn cached(name: &'static str) -> &'static Tokenizer {
    use std::collections::HashMap;
    use std::sync::{LazyLock, Mutex};
    static MADE: LazyLock<Mutex<HashMap<&'static str, &'static Tokenizer>>> = LazyLock::new(Mutex::default);
    let make = || -> &'static Tokenizer {
        Box::leak(Box::new(if name == "scored" { Tokenizer::new(scored()).unwrap() } else { tokenizer(golden(name)) }))
    };
    MADE.lock().unwrap().entry(name).or_insert_with(make)
}

#[test]
fn every_split_pattern_keeps_the_text_and_leaves_one_space_to_the_word() {
    use tandem::text::pre_tokenizer::PreTokenizer;
    let text = "  Hello,\tWorld's  12345 naïve日本語テスト\r\n\r\n   x\n\ty ÄÖü'LL <b>$5.00</b>  ";
    for name in PreTokenizer::names() {
        let mut words = Vec::new();
        PreTokenizer::new(name).unwrap().split(text, &mut |word| words.push(word));
        assert_eq!(words.concat(), text, "{name}");
        assert!(words.iter().all(|word| !word.is_empty()), "{name}");
    }
    let split = |name: &str, text: &'static str| {
        let mut words = Vec::new();
        PreTokenizer::new(name).unwrap().split(text, &mut |word| words.push(word));
        words
    };
    assert_eq!(split("gpt-2", "a   b \n\n c 12345"), ["a", "  ", " b", " \n\n", " c", " 12345"]);
    assert_eq!(split("qwen2", "a   b \n\n  c 123"), ["a", "  ", " b", " \n\n", " ", " c", " ", "1", "2", "3"]);
    assert_eq!(split("llama-bpe", "x12345  "), ["x", "123", "45", "  "]);
    assert_eq!(split("starcoder", "x 12\n\n\ny"), ["x", " ", "1", "2", "\n\n", "\n", "y"]);
    assert_eq!(split("gpt-4o", "HelloWorld ABCdef don't"), ["Hello", "World", " ABCdef", " don't"]);
    assert_eq!(split("deepseek-llm", "a 12\n b!  "), ["a", " ", "12", "\n", " b", "!", "  "]);
}

#[test]
fn long_runs_are_split_in_linear_time() {
    let tokenizer = cached("tokenizer-qwen35.gguf");
    for text in [" ".repeat(3_000_000) + "x", "a".repeat(1_000_000), "\n \n ".repeat(300_000), "'".repeat(1_000_000)] {
        let ids = tokenizer.encode(&text, true);
        assert_eq!(tokenizer.decode(&ids), text.as_bytes());
    }
}

/// A byte-level vocabulary that is right.
fn pairs() -> Vocabulary {
    let file = File::open(golden("llama-f32.gguf")).unwrap();
    Vocabulary { file: "crafted".into(), ..Vocabulary::from_metadata(file.metadata()).unwrap() }
}

#[test]
fn wrong_vocabularies_are_refused_by_key() {
    type Make = fn() -> Vocabulary;
    type Change = fn(&mut Vocabulary);
    let cases: &[(Make, Change, &str, &str)] = &[
        (pairs, |v| v.model = "bert".into(), "tokenizer.ggml.model", "\"bert\""),
        (pairs, |v| v.pre = None, "tokenizer.ggml.pre", "no such key"),
        (pairs, |v| v.pre = Some("qwen99".into()), "tokenizer.ggml.pre", "qwen35"),
        (pairs, |v| v.tokens.clear(), "tokenizer.ggml.tokens", "none"),
        (pairs, |v| v.token_types.truncate(5), "tokenizer.ggml.token_type", "5 entries"),
        (pairs, |v| v.token_types[7] = 9, "tokenizer.ggml.token_type", "9 for token 7"),
        (pairs, |v| v.tokens.truncate(100), "tokenizer.ggml.token_type", "288 entries"),
        (pairs, |v| v.bos = Some(288), "tokenizer.ggml.bos_token_id", "288"),
        (pairs, |v| v.eos = Some(u32::MAX), "tokenizer.ggml.eos_token_id", "4294967295"),
        (pairs, |v| v.eot = Some(5000), "tokenizer.ggml.eot_token_id", "5000"),
        (pairs, |v| v.padding = Some(5000), "tokenizer.ggml.padding_token_id", "5000"),
        (pairs, |v| v.merges[3] = "absent token".into(), "tokenizer.ggml.merges", "absent"),
        (pairs, |v| v.merges[3] = "a Ġ".into(), "tokenizer.ggml.merges", "aĠ"),
        (pairs, |v| v.merges[3] = "nospace".into(), "tokenizer.ggml.merges", "rank 3"),
        (pairs, |v| v.merges[3] = String::new(), "tokenizer.ggml.merges", "rank 3"),
        (pairs, |v| v.merges[3] = " ".into(), "tokenizer.ggml.merges", "rank 3"),
        (pairs, |v| v.merges[3] = "é".into(), "tokenizer.ggml.merges", "rank 3"),
        (pairs, |v| v.tokens[0] = "gone".into(), "tokenizer.ggml.tokens", "byte 0x21"),
        (pairs, |v| v.token_types[250] = 6, "tokenizer.ggml.tokens", "token 250"),
        (pairs, |v| (v.add_eos, v.eos) = (Some(true), None), "tokenizer.ggml.add_eos_token", "no such key"),
        (pairs, |v| (v.tokens[280], v.token_types[280]) = ("x".repeat(5 << 20), 3), "tokenizer.ggml.tokens", "bytes"),
        (scored, |v| v.scores.truncate(3), "tokenizer.ggml.scores", "3 entries"),
        (scored, |v| v.scores.clear(), "tokenizer.ggml.scores", "0 entries"),
        (scored, |v| v.scores[4] = f32::NAN, "tokenizer.ggml.scores", "NaN for token 4"),
        (scored, |v| v.tokens[20] = "<0xG1>".into(), "tokenizer.ggml.tokens", "<0xG1>"),
        (scored, |v| v.tokens[20] = "<0x+1>".into(), "tokenizer.ggml.tokens", "<0x+1>"),
        (scored, |v| v.tokens[20] = "<0x001>".into(), "tokenizer.ggml.tokens", "<0x001>"),
    ];
    for (i, (make, change, key, found)) in cases.iter().enumerate() {
        let mut vocabulary = make();
        change(&mut vocabulary);
        let message = Tokenizer::new(vocabulary).expect_err(&format!("case {i}")).to_string();
        for part in [*key, *found, "expected"] {
            assert!(message.contains(part), "case {i}: {message}");
        }
        assert!(message.len() < 1000, "case {i}: {message}");
    }
    for make in [pairs, scored] {
        Tokenizer::new(make()).unwrap();
    }
}
