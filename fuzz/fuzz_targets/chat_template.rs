//! Chat templates: any text is an error or a template, and rendering ends with text or an error. A panic of the
//! template engine is an error too, as in the program; any other panic is a crash.

#![no_main]

use tandem::text::{ChatTemplate, Message, RenderOptions};

libfuzzer_sys::fuzz_target!(
    init: {
        let abort = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| match panic.location() {
            Some(at) if at.file().contains("minijinja") => eprintln!("the template engine panicked at {at}"),
            _ => abort(panic),
        }));
    },
    |data: &[u8]| {
        let source = String::from_utf8_lossy(data);
        let template = match ChatTemplate::new(source, "<s>".into(), "</s>".into()) {
            Ok(template) => template,
            Err(error) => return assert!(!error.to_string().is_empty()),
        };
        let messages = [
            Message::new("system", "Answer briefly."),
            Message::new("user", "Where is Ravi's owl?"),
            Message::new("assistant", "<think>\nIn the tree.\n</think>\n\nIn the tree."),
            Message::new("user", "Since when? \u{1f989}"),
        ];
        let (count, add_generation_prompt, thinking) =
            [(4, true, None), (2, false, Some(false)), (0, true, Some(true))][data.len() % 3];
        let options = RenderOptions { add_generation_prompt, thinking };
        match template.render(&messages[..count], &options) {
            Ok(text) => assert!(text.len() <= 64 << 20),
            Err(error) => assert!(!error.to_string().is_empty()),
        }
    }
);
