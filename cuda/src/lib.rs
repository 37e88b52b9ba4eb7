//! The CUDA backend: kernels compiled at run time for the GPU found, device arenas, the uploader,
//! graphs, and one implementation of every block. Knows no file, no model architecture and no
//! other backend.
