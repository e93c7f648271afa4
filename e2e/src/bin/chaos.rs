//! `cargo xtask chaos`, once the servers run.

use std::process::ExitCode;

use clap::Parser;
use e2e::chaos::{self, Args};

#[tokio::main]
async fn main() -> ExitCode {
    match Box::pin(chaos::run(Args::parse())).await {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("chaos: {error:#}");
            ExitCode::from(2)
        }
    }
}
