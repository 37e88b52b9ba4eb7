//! Tokenizer construction: any metadata gives an error or a tokenizer that encodes and decodes text without panicking.
//! The input is a GGUF file; its last bytes serve as text.

#![no_main]

use tandem::gguf::File;
use tandem::text::{Tokenizer, Vocabulary};

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let Ok(file) = File::from_bytes(data.to_vec(), "fuzz") else { return };
    let Ok(vocabulary) = Vocabulary::from_metadata(file.metadata()) else { return };
    let Ok(tokenizer) = Tokenizer::new(vocabulary) else { return };
    let text = String::from_utf8_lossy(&data[data.len().saturating_sub(48)..]);
    for control in [false, true] {
        let ids = tokenizer.encode(&text, control);
        assert!(ids.iter().all(|id| (*id as usize) < tokenizer.n_vocab()));
        std::hint::black_box(tokenizer.decode(&ids));
    }
    for id in 0..tokenizer.n_vocab() as u32 {
        std::hint::black_box(tokenizer.piece(id, true));
    }
});
