//! The header: any bytes are a file or an error, and of a file every value and every tensor byte can be read.

#![no_main]

use tandem::gguf::File;
use tandem_spec::TensorSource;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    match File::from_bytes(data.to_vec(), "fuzz") {
        Err(error) => assert!(!error.to_string().is_empty()),
        Ok(file) => {
            let shown: usize = file.metadata().iter().map(|(key, value)| key.len() + value.describe().len()).sum();
            std::hint::black_box(shown);
            for (index, tensor) in file.tensors().iter().enumerate() {
                assert_eq!(file.bytes(index).len(), tensor.n_bytes());
                std::hint::black_box(file.non_finite_block(index));
            }
        }
    }
});
