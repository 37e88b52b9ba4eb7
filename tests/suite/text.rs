use std::path::{Path, PathBuf};

use proptest::prelude::*;
use serde_json::Value;
use tandem::gguf::File;
use tandem::text::{ChatTemplate, Error, Message, RenderOptions, Tokenizer, Vocabulary};

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

fn template(source: &str) -> Result<ChatTemplate, Error> {
    ChatTemplate::new(source, "<s>".into(), "</s>".into())
}

fn messages() -> Vec<Message> {
    vec![
        Message::new("system", "Be brief."),
        Message::new("user", "Hi <you> & me"),
        Message::new("assistant", "<think>\nhm\n</think>\n\nHello!"),
        Message::new("user", "  And\nagain?  "),
    ]
}

fn rendered(source: &str, options: &RenderOptions) -> Result<String, Error> {
    template(source)?.render(&messages(), options)
}

#[test]
fn the_templates_of_files_are_rendered() {
    let expected = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi <you> & me<|im_end|>\n\
        <|im_start|>assistant\n<think>\nhm\n</think>\n\nHello!<|im_end|>\n<|im_start|>user\n  And\nagain?  <|im_end|>\n\
        <|im_start|>assistant\n";
    for path in [story(), golden("llama-f32.gguf")] {
        let file = File::open(&path).unwrap();
        let tokenizer = tokenizer(&path);
        let template = ChatTemplate::from_metadata(file.metadata(), &tokenizer).unwrap().unwrap();
        assert_eq!(template.render(&messages(), &RenderOptions::default()).unwrap(), expected, "{path:?}");
        assert!(!template.knows_thinking());
        let prompt = tokenizer.encode_prompt(expected, true);
        assert_eq!(tokenizer.decode(&prompt), expected.as_bytes());
        assert_eq!(prompt.iter().filter(|&&id| tokenizer.ends_generation(id)).count(), 4);
    }
    let file = File::open(golden("tokenizer-qwen2.gguf")).unwrap();
    assert!(ChatTemplate::from_metadata(file.metadata(), cached("tokenizer-qwen2.gguf")).unwrap().is_none());
}

/// Written for this test in the manner of templates for models that reason: earlier reasoning is dropped, and
/// the generation prompt opens or closes the reasoning.
const REASONING: &str = r#"
{%- macro turn(role, text) %}
    {{- '<|im_start|>' ~ role ~ '\n' ~ text | trim ~ '<|im_end|>\n' }}
{%- endmacro %}
{%- set ns = namespace(last=-1) %}
{%- for message in messages[::-1] %}
    {%- set index = messages | length - 1 - loop.index0 %}
    {%- if ns.last == -1 and message.role == 'user' and not message.content.startswith('<tool_response>') %}
        {%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- if not messages %}
    {{- raise_exception('No messages.') }}
{%- endif %}
{%- for message in messages %}
    {%- if message.content is string %}
        {%- set content = message.content %}
    {%- else %}
        {%- set content = '' %}
    {%- endif %}
    {%- if message.role == 'assistant' and loop.index0 < ns.last %}
        {%- if '</think>' in content %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {{- turn(message.role, content) }}
    {%- elif message['role'] in ['user', 'system'] %}
        {{- turn(message.role, content) }}
    {%- else %}
        {{- raise_exception('Unexpected role ' ~ message.role) }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- else %}
        {{- '<think>\n' }}
    {%- endif %}
{%- endif %}"#;

#[test]
fn reasoning_is_switched_where_the_template_knows_it() {
    let turns = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi <you> & me<|im_end|>\n\
        <|im_start|>assistant\nHello!<|im_end|>\n<|im_start|>user\nAnd\nagain?<|im_end|>\n";
    let template = template(REASONING).unwrap();
    assert!(template.knows_thinking());
    for (thinking, end) in [
        (None, "<|im_start|>assistant\n<think>\n"),
        (Some(true), "<|im_start|>assistant\n<think>\n"),
        (Some(false), "<|im_start|>assistant\n<think>\n\n</think>\n\n"),
    ] {
        let options = RenderOptions { thinking, ..RenderOptions::default() };
        assert_eq!(template.render(&messages(), &options).unwrap(), format!("{turns}{end}"));
    }
    let options = RenderOptions { add_generation_prompt: false, thinking: None };
    assert_eq!(template.render(&messages(), &options).unwrap(), turns);
    let error = template.render(&[], &options).unwrap_err().to_string();
    assert!(error.contains("No messages.") && error.contains("line 1"), "{error}");
    let error = template.render(&[Message::new("robot", "x")], &options).unwrap_err().to_string();
    assert!(error.contains("Unexpected role robot"), "{error}");
    // A long chat stays within its budget.
    let mut long: Vec<Message> = (0..2000).flat_map(|_| messages()[1..3].to_vec()).collect();
    long.push(messages()[3].clone());
    assert!(template.render(&long, &options).unwrap().len() > 150_000);
    let big = [Message::new("user", "word ".repeat(1_000_000))];
    assert!(template.render(&big, &options).unwrap().len() > 4_999_999);
}

#[test]
fn templates_see_what_python_would_give_them() {
    let cases = [
        ("{{ bos_token }}{{ messages[0]['content'] }}{{ eos_token }}", "<s>Be brief.</s>"),
        ("{{ messages[1].content | tojson }}", "\"Hi <you> & me\""),
        ("{{ messages[:1] | tojson }}", r#"[{"role": "system", "content": "Be brief."}]"#),
        (
            "{{ {'a': [1, 2.5, none, true]} | tojson(indent=2) }}",
            "{\n  \"a\": [\n    1,\n    2.5,\n    null,\n    true\n  ]\n}",
        ),
        ("{{ none }} {{ true }} {{ missing }}.", "None True ."),
        ("{% for m in messages if m.role != 'user' %}{{ loop.index }}{{ m.role }},{% endfor %}", "1system,2assistant,"),
        (
            "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.role }}{% break %}{% endfor %}",
            "user",
        ),
        ("{{ 'a-b-c'.split('-') | join('+') }}{{ ' x '.strip() }}{{ 'AbC'.lower() }}", "a+b+cxabc"),
        ("{{ 'abc'[::-1] }}{{ 'abcdef'[1:3] }}{{ 'abc'[-1] }}{{ ('ab' * 3) ~ 2 * 3 }}", "cbabccababab6"),
        ("{{ 'x' if 'a' in 'bac' and 1 < 2 <= 2 else 'y' }}{{ 7 // 2 }}{{ 7 % 4 }}{{ 2 ** 10 }}", "x331024"),
        ("{% set m = messages[0] %}{{ m.get('nope', 'd') }}{{ m.items() | list | length }}", "d2"),
        (
            "{% set ns = namespace(t='') %}{% for m in messages %}{% set ns.t = ns.t ~ m.role[0] %}{% endfor %}{{ ns.t }}",
            "suau",
        ),
        ("{% macro f(x, y=2) %}[{{ x }}{{ y }}]{% endmacro %}{{ f(1) }}{{ f(1, y=3) }}", "[12][13]"),
        ("{% set x %}a{{ 1 }}b{% endset %}{{ x | upper }}", "A1B"),
        ("{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='role') | list | length }}", "2"),
        ("{{ messages | map(attribute='role') | unique | join(',') }}", "system,user,assistant"),
        ("  {% if true %}\n  a\n  {% endif %}\nb\n", "  a\nb"),
        ("{{ strftime_now('%Y') | int > 2020 }}", "True"),
        ("{{ range(3) | list }}{{ 'é' | tojson }}", "[0, 1, 2]\"é\""),
    ];
    for (source, expected) in cases {
        let found = rendered(source, &RenderOptions::default());
        assert_eq!(found.as_deref(), Ok(expected), "{source}");
    }
}

#[test]
fn hostile_templates_end_with_an_error_in_bounded_time_and_memory() {
    let deep = |open: &str, close: &str, n: usize| open.repeat(n) + "x" + &close.repeat(n);
    let cases = [
        "{{ 'x' * 10**9 }}".to_owned(),
        "{{ 'x' * 10**18 }}".into(),
        "{{ (10**9) * 'x' }}".into(),
        "{% set a = [1] * 10**12 %}{{ a | list }}".into(),
        "{{ [1, 2] * 9223372036854775807 | length }}".into(),
        "{% for i in range(60000) %}{% for j in range(60000) %}{% endfor %}{% endfor %}".into(),
        "{% for i in range(60000) %}{% for j in range(60000) %}x{% endfor %}{% endfor %}".into(),
        "{{ range(10**9) | list }}".into(),
        "{{ range(0, 9223372036854775807, 1) | list }}".into(),
        "{{ range(-9223372036854775807, 5, -9223372036854775807) | list }}".into(),
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}".into(),
        "{% macro f(x) %}{{ f(x ~ x) }}{% endmacro %}{{ f('abc') }}".into(),
        "{% macro f(x) %}{{ x }}{{ f(x) }}{{ f(x) }}{% endmacro %}{{ f('abc') }}".into(),
        "{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}".into(),
        "{% set ns = namespace(s='xxxxxxxx') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}".into(),
        "{% set ns = namespace(s='xxxxxxxx') %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}".into(),
        "{% set ns = namespace(s='xx') %}{% for i in range(60) %}{% set b %}{{ ns.s }}{{ ns.s }}{% endset %}{% set ns.s = b %}{% endfor %}".into(),
        "{% set ns = namespace(s=[1, 2]) %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}{{ ns.s | length }}".into(),
        "{% set ns = namespace(s=[1]) %}{% for i in range(60) %}{% set ns.s = [ns.s, ns.s] %}{% endfor %}{{ ns.s }}".into(),
        "{% set ns = namespace(s=[1]) %}{% for i in range(60000) %}{% set ns.s = [ns.s] %}{% endfor %}".into(),
        "{% set ns = namespace(s={}) %}{% for i in range(60000) %}{% set ns.s = {'a': ns.s} %}{% endfor %}".into(),
        "{% set o = namespace() %}{% for i in range(60000) %}{% set n = namespace() %}{% set n.p = o.p %}{% set o.p = n %}{% endfor %}".into(),
        "{% set o = namespace(p=1) %}{% for i in range(60000) %}{% set o.p = dict(a=o.p) %}{% endfor %}".into(),
        "{% set ns = namespace() %}{% set ns.a = ns %}{{ ns }}".into(),
        "{% set ns = namespace() %}{% set ns.a = [{'b': ns}] %}".into(),
        "{% set ns = namespace() %}{% set ns.a, b = ns, 1 %}".into(),
        "{% set ns = namespace() %}{% for a in [ns, ns] %}{% set ns.a = loop %}{% endfor %}".into(),
        "{% set ns = namespace() %}{% set ns.a = range %}".into(),
        "{% set x = 'a' * 5000000 %}{{ x.replace('a', x) }}".into(),
        "{% set x = 'a' * 5000000 %}{{ x | replace('a', x) }}".into(),
        "{% set x = 'a' * 5000000 %}{{ x | list | join(x) }}".into(),
        "{% set x = 'a' * 5000000 %}{{ x.join(x) }}".into(),
        "{% set x = 'a\\n' * 2000000 %}{{ x | indent(60000) }}".into(),
        "{{ 'a' | indent(10**9) }}".into(),
        "{{ messages | tojson(indent=10**9) }}".into(),
        "{{ [1] | batch(10**9, 'x') | list }}".into(),
        "{{ [1] | slice(10**9) | list }}".into(),
        "{{ '%1000000000d' | format(1) }}".into(),
        "{{ '{:1000000000}'.format(1) }}".into(),
        "{% set x = 'a' * 5000000 %}{% for i in range(60000) %}{% if x == x ~ '' %}{% endif %}{% endfor %}".into(),
        "{% set x = 'a' * 5000000 %}{% for i in range(60000) %}{{ x[1:] | length }}{% endfor %}".into(),
        "{% set x = 'a' * 5000000 %}{% for i in range(60000) %}{% if 'b' in x %}{% endif %}{% endfor %}".into(),
        "{% set x = 'a' * 5000000 %}{% for i in range(60000) %}{% set y = x[-1] %}{% endfor %}".into(),
        "{% set x = 'a' * 5000000 %}{% for i in range(60000) %}{% set y = x.upper() %}{% endfor %}".into(),
        "{% set x = 'a' * 5000000 %}{{ x | list | sort | unique | list }}{{ x | list | tojson }}".into(),
        "{{ 'abc'[0:5:-1] }}".into(),
        "{{ 'abc'[::-9223372036854775807 - 1] }}".into(),
        "{{ 'abc'[-9223372036854775807:] }}".into(),
        "{{ 9223372036854775807 * 9223372036854775807 }}{{ 2 ** 10**9 }}".into(),
        "{{ ".to_owned() + &"'aaaaaaaaaaaaaaaa' ~ ".repeat(6000) + "'' }}",
        "{{ ".to_owned() + &"1 + ".repeat(30_000) + "1 }}",
        "{{ ".to_owned() + &deep("(", ")", 60_000) + " }}",
        "{{ ".to_owned() + &deep("[", "]", 60_000) + " }}",
        "{{ ".to_owned() + &"not ".repeat(30_000) + "x }}",
        "{{ x".to_owned() + &".a".repeat(60_000) + " }}",
        "{{ x".to_owned() + &"|a".repeat(60_000) + " }}",
        deep("{% if x %}", "{% endif %}", 6_000),
        "{% if a %}".to_owned() + &"{% elif a %}".repeat(10_000) + "{% endif %}",
        "{% for m in messages %}".repeat(5_000),
        "x".repeat(200_000),
        "{% include 'x' %}".into(),
        "{% extends 'x' %}".into(),
        "{% filter upper %}x{% endfilter %}".into(),
        "{% set x | replace('a', 'b') %}a{% endset %}".into(),
        "{% block a %}{{ self.a() }}{% endblock %}".into(),
        "{% for m in messages %}".into(),
        "{{ messages | nonsense }}".into(),
        "{{ messages[0].content.nonsense() }}".into(),
        "{{ nothing.at.all }}".into(),
        "{% endfor %}".into(),
        "{{ 'unterminated }}".into(),
    ];
    for source in cases {
        let shown: String = source.chars().take(120).collect();
        let error = rendered(&source, &RenderOptions::default()).expect_err(&shown).to_string();
        assert!(error.starts_with("the chat template can't be used: ") && error.len() < 700, "{shown}: {error}");
    }
    // Macros that hold each other, tens of thousands deep, are let go of without harm.
    let chain = "{% set o = namespace(p=1) %}{% for i in range(60000) %}{% set q = o.p %}{% macro m() %}{{ q }}{% endmacro %}{% set o.p = m %}{% endfor %}{{ o.p() }}";
    assert!(rendered(chain, &RenderOptions::default()).is_ok());
    // A loop that is asked about itself keeps a copy.
    let changed = "{% for a in messages %}{{ loop.changed(loop) }}{% endfor %}";
    assert_eq!(rendered(changed, &RenderOptions::default()).as_deref(), Ok("TrueTrueTrueTrue"));
}
