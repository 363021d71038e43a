//! The tile instructions, which the compiler does not offer yet.

#![allow(unsafe_code, reason = "tile registers are used by inline assembly; bounds are checked once per product")]

use super::{DEPTH, Left, SIDE, TILE_WORDS};
use crate::gemm::fits;

/// Whether this processor has tile registers and the system lets this process use them. Asked for once.
#[must_use]
pub fn available() -> bool {
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    {
        static AVAILABLE: std::sync::LazyLock<bool> = std::sync::LazyLock::new(amx::permitted);
        *AVAILABLE
    }
    #[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
    false
}

/// `c = a b`, or `c += a b` if `add`, in f32: `dims = (m, n, k)`, `m` a multiple of 16, `n` and `k` of 32; `c` is
/// row-major with `c_row` between rows.
///
/// # Panics
/// If an operand is shorter than its size says, or tile registers are not [`available`] and there is something to
/// multiply.
pub fn product(dims: (usize, usize, usize), a: Left<'_>, b: &[u32], c: &mut [f32], c_row: usize, add: bool) {
    let (m, n, k) = dims;
    assert!(m.is_multiple_of(SIDE) && n.is_multiple_of(DEPTH) && k.is_multiple_of(DEPTH), "tiles are whole");
    if m == 0 || n == 0 {
        return;
    }
    let holds = |words: &[u32], n: usize| n.checked_mul(k).is_some_and(|len| len / 2 <= words.len());
    assert!(holds(b, n), "right operand out of bounds");
    assert!(n <= c_row && fits((m, n), c_row, 1, c.len()), "result out of bounds");
    let inside = match a {
        Left::Rows(rows, stride) => fits((m, k), stride, 1, rows.len()),
        Left::Tiles(words) => holds(words, m),
    };
    assert!(inside, "left operand out of bounds");
    if k == 0 {
        if !add {
            c.chunks_mut(c_row).take(m).for_each(|row| row[..n].fill(0.0));
        }
        return;
    }
    assert!(available(), "this processor has no tile registers");
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    {
        // Bytes between rows of a tile, tiles along the sum, and blocks of rows.
        let (a, strides) = match a {
            Left::Rows(rows, stride) => (rows.as_ptr().cast::<u8>(), [2 * stride, 2 * DEPTH, 2 * stride * SIDE]),
            Left::Tiles(words) => (words.as_ptr().cast(), [4 * SIDE, 4 * TILE_WORDS, 2 * k * SIDE]),
        };
        // SAFETY: tile registers may be used, and all elements that the sizes name were found inside their slices.
        unsafe { amx::product(dims, (a, strides), b.as_ptr().cast(), (c.as_mut_ptr(), c_row), add) };
    }
}

/// The transpose of 16 x 16 words.
pub(super) fn transpose(from: &[u32; TILE_WORDS], to: &mut [u32]) {
    let to = &mut to[..TILE_WORDS];
    #[cfg(target_arch = "x86_64")]
    if crate::features::uses_avx512() {
        // SAFETY: AVX-512F was found, and both sides hold 256 words; they are moved as they are.
        unsafe {
            crate::avx512::gemm::transpose(from.as_ptr().cast(), SIDE, SIDE, SIDE, to.as_mut_ptr().cast());
        }
        return;
    }
    for (i, row) in from.chunks_exact(SIDE).enumerate() {
        row.iter().enumerate().for_each(|(j, word)| to[j * SIDE + i] = *word);
    }
}

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod amx {
    use super::{DEPTH, SIDE};
    use std::arch::asm;
    use std::arch::x86_64::__cpuid_count;

    /// Palette 1: eight tiles of 16 rows of 64 bytes.
    #[repr(C, align(64))]
    struct Config {
        palette: u8,
        start_row: u8,
        reserved: [u8; 14],
        row_bytes: [u16; 16],
        rows: [u8; 16],
    }

    static CONFIG: Config = {
        let (mut row_bytes, mut rows) = ([0; 16], [0; 16]);
        let mut idx = 0;
        while idx < 8 {
            row_bytes[idx] = 64;
            rows[idx] = 16;
            idx += 1;
        }
        Config { palette: 1, start_row: 0, reserved: [0; 14], row_bytes, rows }
    };

    pub(super) fn permitted() -> bool {
        const TILES_AND_BF16: u32 = 1 << 24 | 1 << 22;
        if !crate::features::uses_avx512() || __cpuid_count(7, 0).edx & TILES_AND_BF16 != TILES_AND_BF16 {
            return false;
        }
        // The kernel saves tile registers only for processes that asked: arch_prctl(ARCH_REQ_XCOMP_PERM, XTILEDATA).
        let mut result: i64 = 158;
        // SAFETY: the call changes a permission of this process and no memory; registers it changes are named.
        unsafe {
            asm!(
                "syscall",
                inout("rax") result,
                in("rdi") 0x1023,
                in("rsi") 18,
                out("rcx") _,
                out("r11") _,
                options(nostack),
            );
        }
        result == 0
    }

    /// # Safety
    /// Tile registers may be used; every tile that the sizes name lies inside its operand.
    // SAFETY: what callers must see to stands above; each block below says why it may.
    pub(super) unsafe fn product(
        (m, n, k): (usize, usize, usize),
        (a, [a_row, a_step, a_block]): (*const u8, [usize; 3]),
        b: *const u8,
        (c, c_row): (*mut f32, usize),
        add: bool,
    ) {
        let (n_steps, b_block) = (k / DEPTH, k / DEPTH * 1024);
        // SAFETY: the configuration outlives the instruction.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const CONFIG, options(nostack, readonly)) };
        for col in (0..n).step_by(2 * SIDE) {
            let mut row = 0;
            while row < m {
                let two = row + 2 * SIDE <= m;
                // SAFETY: offsets are those of whole tiles inside the operands; a missing second block of rows is
                // the first once more, and is not stored.
                unsafe {
                    let c0 = c.add(row * c_row + col);
                    let c1 = if two { c0.add(SIDE * c_row) } else { c0 };
                    let a0 = a.add(row / SIDE * a_block);
                    let a1 = if two { a0.add(a_block) } else { a0 };
                    let b0 = b.add(col / SIDE * b_block);
                    block([a0, a1], (a_row, a_step), [b0, b0.add(b_block)], n_steps, [c0, c1], 4 * c_row, (add, two));
                }
                row += 2 * SIDE;
            }
        }
        // SAFETY: gives the registers back; nothing that is needed is in them.
        unsafe { asm!("tilerelease", options(nostack, nomem)) };
    }

    /// 32 x 32 sums in four registers.
    ///
    /// # Safety
    /// That of [`product`].
    #[inline(always)]
    // SAFETY: what callers must see to is said of `product`.
    unsafe fn block(
        a: [*const u8; 2],
        (a_row, a_step): (usize, usize),
        b: [*const u8; 2],
        n_steps: usize,
        c: [*mut f32; 2],
        c_bytes: usize,
        (add, two): (bool, bool),
    ) {
        // SAFETY: all tiles lie inside their operands; the sums are in registers 0 to 3, which nothing else uses.
        unsafe {
            if add {
                asm!(
                    "tileloadd tmm0, [{c0} + {s}]", "tileloadd tmm1, [{c0} + {s} + 64]",
                    "tileloadd tmm2, [{c1} + {s}]", "tileloadd tmm3, [{c1} + {s} + 64]",
                    c0 = in(reg) c[0], c1 = in(reg) c[1], s = in(reg) c_bytes, options(nostack, readonly),
                );
            } else {
                asm!("tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3", options(nostack, nomem),);
            }
            asm!(
                "2:",
                "tileloadd tmm4, [{a0} + {row}]",
                "tileloadd tmm6, [{b0} + {word}]",
                "tileloadd tmm7, [{b1} + {word}]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tileloadd tmm5, [{a1} + {row}]",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "add {a0}, {step}",
                "add {a1}, {step}",
                "add {b0}, 1024",
                "add {b1}, 1024",
                "dec {n}",
                "jnz 2b",
                a0 = inout(reg) a[0] => _, a1 = inout(reg) a[1] => _, b0 = inout(reg) b[0] => _,
                b1 = inout(reg) b[1] => _, n = inout(reg) n_steps => _, row = in(reg) a_row, step = in(reg) a_step,
                word = in(reg) 64usize, options(nostack, readonly),
            );
            asm!(
                "tilestored [{c0} + {s}], tmm0", "tilestored [{c0} + {s} + 64], tmm1",
                c0 = in(reg) c[0], s = in(reg) c_bytes, options(nostack),
            );
            if two {
                asm!(
                    "tilestored [{c1} + {s}], tmm2", "tilestored [{c1} + {s} + 64], tmm3",
                    c1 = in(reg) c[1], s = in(reg) c_bytes, options(nostack),
                );
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Matrix, n_words, whole};
    use super::*;
    use half::bf16;

    /// Whether there are tile registers; says so where a test cannot run. With `HALFMODE_REQUIRE_AMX=1` that is a failure.
    fn has_tiles() -> bool {
        if !available() {
            let required = std::env::var_os("HALFMODE_REQUIRE_AMX").is_some_and(|it| it == "1");
            assert!(!required, "HALFMODE_REQUIRE_AMX is set, but this processor has no tile registers");
            eprintln!("skipped: this processor has no tile registers");
        }
        available()
    }

    fn values(len: usize, seed: f64) -> Vec<bf16> {
        (0..len).map(|i| bf16::from_f64(((i + 1) as f64 * 0.754_877_666 + seed).fract() - 0.5)).collect()
    }

    /// All tiles of an operand, block by block.
    fn tiles(n: usize, k: usize, fill: impl Fn(usize, &mut [u32])) -> Vec<u32> {
        let mut words = vec![7; n_words(n, k)];
        let block = whole(k) / 2 * SIDE;
        words.chunks_exact_mut(block).enumerate().for_each(|(idx, tiles)| fill(idx * SIDE, tiles));
        words
    }

    /// Every way to hand an operand over, against sums in f64 and against the products that widen to f32. A product of
    /// two bfloat16 numbers is exact in f32; k sums of terms below a quarter leave at most k^2 / 4 half units.
    #[test]
    fn products_are_those_of_wider_numbers() {
        if !has_tiles() {
            return;
        }
        for (m, n, k) in [(16, 32, 32), (48, 33, 65), (32, 64, 512), (7, 70, 31), (96, 1, 1), (130, 256, 256)] {
            let (a, b) = (values(m * k, 0.1), values(k * n, 0.2));
            let (wide_m, wide_n, wide_k) = (m.div_ceil(SIDE) * SIDE, whole(n), whole(k));
            let mut rows = vec![bf16::ZERO; wide_m * wide_k];
            a.chunks(k).enumerate().for_each(|(i, row)| rows[i * wide_k..][..k].copy_from_slice(row));
            let flip = |x: &[bf16], rows: usize, cols: usize| -> Vec<bf16> {
                (0..rows * cols).map(|at| x[at % rows * cols + at / rows]).collect()
            };
            let (a_t, b_t) = (flip(&a, m, k), flip(&b, k, n));
            let matrix = |data, rows, cols| Matrix { data, rows, cols, stride: cols };
            let left = tiles(m, k, |first, tiles| matrix(&a_t, k, m).left_transposed(first, tiles));
            let right = tiles(n, k, |first, tiles| matrix(&b, k, n).right(first, tiles));
            assert_eq!(right, tiles(n, k, |first, tiles| matrix(&b_t, n, k).right_transposed(first, tiles)));
            let mut c = vec![f32::NAN; wide_m * wide_n];
            let dims = (wide_m, wide_n, wide_k);
            product(dims, Left::Rows(&rows, wide_k), &right, &mut c, wide_n, false);
            let once = c.clone();
            product(dims, Left::Tiles(&left), &right, &mut c, wide_n, true);
            let wide = |x: &[bf16]| x.iter().map(|x| x.to_f32()).collect::<Vec<_>>();
            let mut widened = vec![0.0; m * n];
            let (a_mat, b_mat) = (wide(&a), wide(&b));
            let operands = (crate::Mat::rows(&a_mat, k), crate::Mat::rows(&b_mat, n));
            let target = crate::MatMut::rows(&mut widened, n);
            crate::gemm::product_f32((m, n, k), operands.0, operands.1, target, 0.0, 1.0);
            let bound = (k * k) as f64 / 4.0 * 2f64.powi(-24);
            for (i, j) in (0..m).flat_map(|i| (0..n).map(move |j| (i, j))) {
                let want: f64 = (0..k).map(|l| a[i * k + l].to_f64() * b[l * n + j].to_f64()).sum();
                let got = f64::from(once[i * wide_n + j]);
                assert!((got - want).abs() <= bound, "{m} {n} {k}: {got} {want}");
                assert!((got - f64::from(widened[i * n + j])).abs() <= 2.0 * bound, "{m} {n} {k}: {got}");
                let twice = f64::from(c[i * wide_n + j]);
                assert!((twice - 2.0 * want).abs() <= 4.0 * bound, "{m} {n} {k}: {twice} {want}");
            }
        }
    }

    #[test]
    #[should_panic(expected = "right operand out of bounds")]
    fn operands_out_of_bounds_are_seen() {
        product((16, 32, 32), Left::Rows(&values(512, 0.1), 32), &[0; 511], &mut [0.0; 512], 32, false);
    }

    /// 16 rows whose offsets wrap round to 32.
    #[test]
    #[should_panic(expected = "left operand out of bounds")]
    fn offsets_beyond_the_address_space_are_seen() {
        let stride = usize::MAX / 15 + 1;
        product((16, 32, 32), Left::Rows(&values(64, 0.1), stride), &[0; 512], &mut [0.0; 512], 32, false);
    }

    #[test]
    fn a_sum_of_nothing_is_zero() {
        let mut c = [f32::NAN; 16 * 40];
        product((16, 32, 0), Left::Rows(&[], 0), &[], &mut c, 40, false);
        assert!(c.chunks(40).all(|row| row[..32].iter().all(|c| *c == 0.0) && row[32..].iter().all(|c| c.is_nan())));
        let mut c = [2.0; 512];
        product((16, 32, 0), Left::Rows(&[], 0), &[], &mut c, 32, true);
        assert_eq!(c.map(f32::to_bits), [2f32.to_bits(); 512]);
    }
}
