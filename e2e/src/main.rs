//! The program under test: `seckill`, nothing else.

use std::process::ExitCode;

fn main() -> ExitCode {
    seckill::cli::main()
}
