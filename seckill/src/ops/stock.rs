//! `seckill stock report|reconcile|rebuild`: a sale's permits beside its ledger, and making them anew. Without a verb the same word
//! runs the role, see [`crate::config::StockArgs`].

use clap::Subcommand;
use proto::v1::{
    GetStockRequest, RebuildStockRequest, ReconcileStockRequest, StockReconciliation, StockReport,
    sales_client::SalesClient,
};

use super::{DoorArgs, table, told};

/// What can be done with stock.
#[derive(Subcommand, Clone, Debug)]
pub enum StockVerb {
    /// Show a sale's ledger beside its permits.
    Report {
        /// The sale.
        sale: String,
        /// The mesh.
        #[command(flatten)]
        door: DoorArgs,
    },
    /// Tell what reconciliation would find: ledger, holds and permits beside each other. Changes nothing.
    Reconcile {
        /// The sale.
        sale: String,
        /// The mesh.
        #[command(flatten)]
        door: DoorArgs,
    },
    /// Make a sale's permits anew from its ledger. Buyers are told STOCK_REBUILDING until it is done.
    Rebuild {
        /// The sale.
        sale: String,
        /// Why; it is recorded.
        #[arg(long, default_value = "")]
        reason: String,
        /// The mesh.
        #[command(flatten)]
        door: DoorArgs,
    },
}

/// Runs the verb. False when the gateway refused it.
pub async fn run(verb: StockVerb) -> anyhow::Result<bool> {
    told(
        async {
            match verb {
                StockVerb::Report { sale, door } => {
                    let mut sales = SalesClient::new(door.open().await?);
                    let report = sales.get_stock(GetStockRequest { sale }).await?;
                    door.output.print("StockReport", report.get_ref(), show)
                }
                StockVerb::Reconcile { sale, door } => {
                    let found = door.operations().await?.reconcile_stock(ReconcileStockRequest { sale }).await?;
                    door.output.print("StockReconciliation", found.get_ref(), reconciliation)
                }
                StockVerb::Rebuild { sale, reason, door } => {
                    let rebuilt = door.operations().await?.rebuild_stock(RebuildStockRequest { sale, reason }).await?;
                    door.output.print("StockReport", rebuilt.get_ref(), show)
                }
            }
        }
        .await,
    )
}

fn show(report: &StockReport) -> String {
    let StockReport { sale, total, available, held, sold, permits, unpersisted_grants, slack, epoch, .. } = report;
    let units = [total, available, held, sold, permits, unpersisted_grants, slack, epoch].map(ToString::to_string);
    let [total, available, held, sold, permits, grants, slack, epoch] = units;
    let state = report.state().as_str_name().to_owned();
    let row = [sale.clone(), total, available, held, sold, permits, grants, slack, epoch, state];
    table(["sale", "total", "available", "held", "sold", "permits", "grants", "slack", "epoch", "permits are"], [row])
}

fn reconciliation(found: &StockReconciliation) -> String {
    let StockReconciliation { stock, locked_in_holds, sold_in_holds, outbox_is_empty, units, .. } = found;
    let outbox = if *outbox_is_empty { "empty" } else { "not empty: releases are on their way to the permits" };
    format!(
        "{}finding  {} ({units} units)\nholds    {locked_in_holds} locked, {sold_in_holds} sold\noutbox   {outbox}",
        stock.as_ref().map(show).unwrap_or_default(),
        found.finding().as_str_name(),
    )
}
