//! `seckill actions`: what operators did.

use clap::Args;
use proto::v1::{Action, ListActionsRequest, ListActionsResponse};

use super::{DoorArgs, PAGE, pages, table, time, told};

/// Options of `seckill actions`.
#[derive(Args, Clone, Debug)]
pub struct ActionsArgs {
    /// Only what was done to this, such as sales/spring or sagas/<saga>.
    #[arg(long, default_value = "")]
    pub target: String,
    /// As many, the newest first.
    #[arg(long, default_value_t = 50, value_name = "COUNT")]
    pub limit: usize,
    /// The mesh.
    #[command(flatten)]
    pub door: DoorArgs,
}

/// Lists them. False when the gateway refused it.
pub async fn run(args: ActionsArgs) -> anyhow::Result<bool> {
    let ActionsArgs { target, limit, door } = args;
    let output = door.output;
    let mut door = door.operations().await?;
    told(
        async {
            let actions = pages(limit, async |page_token| {
                let request = ListActionsRequest { page_size: PAGE, page_token, target: target.clone() };
                let page = door.list_actions(request).await?.into_inner();
                Ok((page.actions, page.next_page_token))
            })
            .await?;
            output.print("ListActionsResponse", &ListActionsResponse { actions, ..Default::default() }, list)
        }
        .await,
    )
}

fn list(found: &ListActionsResponse) -> String {
    let rows = found.actions.iter().map(|action| {
        let Action { operator, verb, target, detail, reason, error, .. } = action;
        let outcome = match (action.outcome().as_str_name(), error.as_str()) {
            (outcome, "") => outcome.to_owned(),
            (outcome, error) => format!("{outcome} {error}"),
        };
        let at = time(action.time.as_ref());
        [&at, operator, verb, target, detail, &outcome, reason].map(String::clone)
    });
    table(["time", "operator", "action", "target", "detail", "outcome", "reason"], rows)
}
