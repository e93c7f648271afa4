//! `seckill saga …`: sagas, and help for those that are stuck.

use clap::{Args, Subcommand};
use proto::{
    WireMoney,
    v1::{
        AbandonSagaRequest, ExplainSagaRequest, GetSagaRequest, ListSagasRequest, ListSagasResponse, RetrySagaRequest,
        Saga, SagaCourse, SagaExplanation,
    },
};

use super::{DoorArgs, PAGE, pages, table, time, told};

/// Options of `seckill saga`.
#[derive(Args, Clone, Debug)]
pub struct SagaArgs {
    /// What to do.
    #[command(subcommand)]
    pub verb: SagaVerb,
    /// The mesh.
    #[command(flatten)]
    pub door: DoorArgs,
}

/// What can be done with sagas.
#[derive(Subcommand, Clone, Debug)]
pub enum SagaVerb {
    /// List stuck sagas, or those in a state.
    List {
        /// Only sagas in this state.
        #[arg(long, default_value = "")]
        state: String,
    },
    /// Show one saga: what it holds, its last error and next attempt, its history.
    Show {
        /// Its id; an order saga's is its order's.
        saga: String,
    },
    /// Tell what a retry or an abandon would do to a stuck saga, without doing it.
    Explain {
        /// Its id.
        saga: String,
    },
    /// Put a stuck saga back to work.
    Retry {
        /// Its id.
        saga: String,
        /// Why; it is recorded.
        #[arg(long, default_value = "")]
        reason: String,
    },
    /// Give a stuck saga up.
    Abandon {
        /// Its id.
        saga: String,
        /// Why; it is recorded.
        #[arg(long)]
        reason: String,
    },
}

/// Runs the verb. False when the gateway refused it.
pub async fn run(args: SagaArgs) -> anyhow::Result<bool> {
    let output = args.door.output;
    let mut door = args.door.operations().await?;
    told(
        async {
            match args.verb {
                SagaVerb::List { state } => {
                    let sagas = pages(usize::MAX, async |page_token| {
                        let request = ListSagasRequest { page_size: PAGE, page_token, state: state.clone() };
                        let page = door.list_sagas(request).await?.into_inner();
                        Ok((page.sagas, page.next_page_token))
                    })
                    .await?;
                    output.print("ListSagasResponse", &ListSagasResponse { sagas, ..Default::default() }, list)
                }
                SagaVerb::Show { saga } => {
                    output.print("Saga", door.get_saga(GetSagaRequest { saga }).await?.get_ref(), show)
                }
                SagaVerb::Explain { saga } => {
                    let explained = door.explain_saga(ExplainSagaRequest { saga }).await?;
                    output.print("SagaExplanation", explained.get_ref(), explain)
                }
                SagaVerb::Retry { saga, reason } => {
                    let retried = door.retry_saga(RetrySagaRequest { saga, reason }).await?;
                    output.print("Saga", retried.get_ref(), show)
                }
                SagaVerb::Abandon { saga, reason } => {
                    let abandoned = door.abandon_saga(AbandonSagaRequest { saga, reason }).await?;
                    output.print("Saga", abandoned.get_ref(), show)
                }
            }
        }
        .await,
    )
}

fn list(found: &ListSagasResponse) -> String {
    let rows = found.sagas.iter().map(|saga| {
        let Saga { name, kind, state, attempts, last_error, .. } = saga;
        let id = name.trim_start_matches("sagas/");
        let next = time(saga.next_attempt_time.as_ref());
        [id, kind, state, &attempts.to_string(), &next, last_error].map(str::to_owned)
    });
    table(["saga", "kind", "state", "attempts", "next attempt", "last error"], rows)
}

fn show(saga: &Saga) -> String {
    let Saga { name, kind, state, order, sale, buyer, attempts, .. } = saga;
    let stuck = if saga.stuck { "  STUCK" } else { "" };
    let mut lines = vec![
        format!("{name}  {kind}  {state}{stuck}"),
        format!("about       {order} of {buyer} in {sale}, payable until {}", time(saga.expire_time.as_ref())),
    ];
    if let Some(holdings) = &saga.holdings {
        lines.push(format!(
            "units       {} ({} by hold {}, granted in epoch {})",
            holdings.units().as_str_name(),
            holdings.quantity,
            holdings.hold,
            holdings.grant_epoch
        ));
        let amount = holdings.amount.as_ref().map(amount).unwrap_or_default();
        let by = match (holdings.payment.as_str(), holdings.decline_code.as_str()) {
            ("", _) => String::new(),
            (id, "") => format!(" by {} as payment {id}", holdings.payment_method),
            (id, code) => format!(" by {} as payment {id}, declined: {code}", holdings.payment_method),
        };
        lines.push(format!("money       {} ({amount}{by})", holdings.money().as_str_name()));
    }
    let next = match &saga.next_attempt_time {
        Some(next) => format!("the next at {next}"),
        None => "none to come".to_owned(),
    };
    lines.push(format!("attempts    {attempts} at this step, {next}"));
    if !saga.last_error.is_empty() {
        lines.push(format!("last error  {}", saga.last_error));
    }
    let history = saga.history.iter().map(|event| {
        let version = event.version.to_string();
        [&version, &time(event.time.as_ref()), &event.from, &event.to, &event.detail].map(String::clone)
    });
    lines.push(String::new());
    lines.push(table(["version", "time", "from", "to", "what happened"], history));
    lines.join("\n")
}

/// To the cent, or to the nano where there is more to it.
fn amount(money: &WireMoney) -> String {
    let WireMoney { currency_code, units, nanos } = money;
    format!("{currency_code} {units}.{nanos:09}").trim_end_matches("0000000").to_owned()
}

fn explain(explanation: &SagaExplanation) -> String {
    let SagaExplanation { saga, state, past_pivot, retry, abandon } = explanation;
    let pivot = if *past_pivot { "past the pivot: only forward" } else { "not past the pivot" };
    let [retry, abandon] = [retry, abandon].map(|way| way.as_ref().map_or_else(|| "is refused".to_owned(), course));
    format!(
        "{saga}  {state}  {pivot}\nretry    {retry}\nabandon  {abandon}\n\
         Nothing was done. A step that finds something else when it runs leads elsewhere."
    )
}

fn course(course: &SagaCourse) -> String {
    let SagaCourse { steps, compensates, resulting_state } = course;
    match (steps.as_slice(), compensates) {
        ([], _) => format!("does nothing more; the saga ends in {resulting_state} and an operator owns what is left"),
        (steps, false) => format!("does {}; then {resulting_state}", steps.join(", ")),
        (steps, true) => format!("gives back by {}; then {resulting_state}", steps.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amounts_are_told_to_the_cent_or_exactly() {
        let told = |units, nanos| amount(&WireMoney { currency_code: "EUR".into(), units, nanos });
        assert_eq!(told(19, 990_000_000), "EUR 19.99");
        assert_eq!(told(100, 0), "EUR 100.00");
        assert_eq!(told(0, 1), "EUR 0.000000001");
    }
}
