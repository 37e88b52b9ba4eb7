//! Which instruction set the kernels use; chosen once, at load.

/// Instruction set of the CPU kernels. Each has its own kernels; packed layouts depend on the rows of a panel alone
/// ([`crate::matrix::panel_rows`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Isa {
    /// [`Isa::Avx512`], and AMX tiles of 8-bit integers for prompts.
    Amx,
    /// AVX-512 F, BW, VL, DQ and VNNI: 16-row panels, `vpdpbusd`.
    Avx512,
    /// [`Isa::Avx2`], and AVX-VNNI: 8-row panels, `vpdpbusd`.
    AvxVnni,
    /// AVX2, FMA and F16C: 8-row panels, `vpmaddubsw`.
    Avx2,
    /// Plain Rust, any processor.
    Portable,
}

impl Isa {
    /// All of them, best first.
    pub const ALL: [Isa; 5] = [Isa::Amx, Isa::Avx512, Isa::AvxVnni, Isa::Avx2, Isa::Portable];

    /// The best one that this processor has.
    pub fn detect() -> Self {
        Self::ALL.into_iter().find(|isa| isa.is_available()).expect("plain Rust runs anywhere")
    }

    /// Whether this processor can run it.
    pub fn is_available(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        match self {
            Isa::Amx => Isa::Avx512.is_available() && amx::is_available(),
            Isa::Avx512 => {
                Isa::Avx2.is_available()
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512vl")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vnni")
            }
            Isa::AvxVnni => Isa::Avx2.is_available() && is_x86_feature_detected!("avxvnni"),
            Isa::Avx2 => {
                is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c")
            }
            Isa::Portable => true,
        }
        #[cfg(not(target_arch = "x86_64"))]
        {
            self == Isa::Portable
        }
    }

    /// Whether it includes AVX-512.
    pub(crate) fn has_avx512(self) -> bool {
        matches!(self, Isa::Amx | Isa::Avx512)
    }

    /// Name as written in `TANDEM_CPU_ISA`.
    pub fn name(self) -> &'static str {
        match self {
            Isa::Amx => "amx",
            Isa::Avx512 => "avx512",
            Isa::AvxVnni => "avxvnni",
            Isa::Avx2 => "avx2",
            Isa::Portable => "portable",
        }
    }

    /// The one with this name.
    pub fn by_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|isa| isa.name() == name)
    }
}

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod amx {
    use std::arch::x86_64::__cpuid_count;
    use std::sync::OnceLock;

    /// Whether the processor has tiles of 8-bit integers and the kernel lets this process use them: it saves their
    /// 8 KiB for a process only once it was asked to.
    pub fn is_available() -> bool {
        static AVAILABLE: OnceLock<bool> = OnceLock::new();
        *AVAILABLE.get_or_init(|| {
            const ARCH_REQ_XCOMP_PERM: libc::c_ulong = 0x1023;
            const XTILEDATA: libc::c_ulong = 18;
            const TILES_OF_INT8: u32 = 1 << 24 | 1 << 25;
            // Leaf 7 exists where AVX-512 does, which the caller asked for first.
            let has = __cpuid_count(7, 0).edx & TILES_OF_INT8 == TILES_OF_INT8;
            // SAFETY: the call takes two numbers and changes what the kernel saves for this process.
            has && unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XTILEDATA) } == 0
        })
    }
}

#[cfg(all(target_arch = "x86_64", not(target_os = "linux")))]
mod amx {
    /// Other systems are asked in other ways, which are not written.
    pub fn is_available() -> bool {
        false
    }
}
