//! The GPU of the tests: the first one, with a compiler that keeps cubins beside the build.

use std::path::PathBuf;
use std::sync::Arc;
use tandem_cuda::{Compiler, Device};

/// The GPU and what makes its compilers, or `None` after printing why there is none.
pub fn gpu() -> Option<(Arc<Device>, impl Fn() -> Compiler)> {
    let libs = std::env::var_os("TANDEM_CUDA_LIBS").map(PathBuf::from);
    let cache = std::env::temp_dir().join("tandem-test-cubins");
    let compiler = move || Compiler::new(libs.as_deref(), Some(cache.clone()));
    match Device::open(0).and_then(|device| compiler().map(|_| device)) {
        Ok(device) => Some((Arc::new(device), move || compiler().expect("loaded before"))),
        Err(e) => {
            println!("skipped: {e}");
            None
        }
    }
}
