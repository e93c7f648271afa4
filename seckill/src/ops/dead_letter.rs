//! `seckill dead-letter …`: messages that nobody could use, and another try for them.

use clap::{Args, Subcommand};
use proto::v1::{
    DeadLetter, GetDeadLetterRequest, ListDeadLettersRequest, ListDeadLettersResponse, RedriveDeadLetterRequest,
};

use super::{DoorArgs, PAGE, pages, table, time, told};

/// Options of `seckill dead-letter`.
#[derive(Args, Clone, Debug)]
pub struct DeadLetterArgs {
    /// What to do.
    #[command(subcommand)]
    pub verb: DeadLetterVerb,
    /// The mesh.
    #[command(flatten)]
    pub door: DoorArgs,
}

/// What can be done with dead letters.
#[derive(Subcommand, Clone, Debug)]
pub enum DeadLetterVerb {
    /// List them, oldest first.
    List,
    /// Show one: why it was given up, and its payload.
    Show {
        /// Its id.
        dead_letter: String,
    },
    /// Publish it again to where it came from, and forget it. Once the cause is gone: otherwise it comes back.
    Redrive {
        /// Its id.
        dead_letter: String,
        /// Why; it is recorded.
        #[arg(long, default_value = "")]
        reason: String,
    },
}

/// Runs the verb. False when the gateway refused it.
pub async fn run(args: DeadLetterArgs) -> anyhow::Result<bool> {
    let output = args.door.output;
    let mut door = args.door.operations().await?;
    told(
        async {
            match args.verb {
                DeadLetterVerb::List => {
                    let dead_letters = pages(usize::MAX, async |page_token| {
                        let request = ListDeadLettersRequest { page_size: PAGE, page_token };
                        let page = door.list_dead_letters(request).await?.into_inner();
                        Ok((page.dead_letters, page.next_page_token))
                    })
                    .await?;
                    let all = ListDeadLettersResponse { dead_letters, ..Default::default() };
                    output.print("ListDeadLettersResponse", &all, list)
                }
                DeadLetterVerb::Show { dead_letter } => {
                    let letter = door.get_dead_letter(GetDeadLetterRequest { dead_letter }).await?;
                    output.print("DeadLetter", letter.get_ref(), show)
                }
                DeadLetterVerb::Redrive { dead_letter, reason } => {
                    let redriven = door.redrive_dead_letter(RedriveDeadLetterRequest { dead_letter, reason }).await?;
                    output.print("DeadLetter", redriven.get_ref(), show)
                }
            }
        }
        .await,
    )
}

fn list(found: &ListDeadLettersResponse) -> String {
    let rows = found.dead_letters.iter().map(|letter| {
        let DeadLetter { name, subject, message_id, attempts, reason, .. } = letter;
        let id = name.trim_start_matches("deadLetters/");
        let at = time(letter.time.as_ref());
        [id, &at, subject, message_id, &attempts.to_string(), reason].map(str::to_owned)
    });
    table(["dead letter", "time", "subject", "message", "attempts", "why"], rows)
}

fn show(letter: &DeadLetter) -> String {
    let DeadLetter { name, subject, message_id, attempts, reason, payload, .. } = letter;
    let at = time(letter.time.as_ref());
    format!(
        "{name}\nsubject   {subject}\nmessage   {message_id}\nattempts  {attempts}, given up at {at}\nwhy       {reason}\n\
         payload   {} bytes: {}",
        payload.len(),
        payload.escape_ascii()
    )
}
