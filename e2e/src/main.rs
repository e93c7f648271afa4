//! The program under test: `seckill`, nothing else.

use std::process::ExitCode;

// As in the released program: what is measured here is told of that.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    seckill::cli::main()
}
