/** The worklist page. The endpoint serves it with its modules; a report has all in one file. */

import { byId, make } from "./dom.js";
import { markSelected, showPosition, showRows } from "./list.js";
import { Endpoint, Report } from "./source.js";
import { closeStudy, currentViewer, openStudy, pressFull } from "./study.js";
import { showSummary } from "./summary.js";
import { NUM_WINDOWS } from "./viewer.js";

const PAGE_ROWS = 200;
const SEARCH_DELAY_MS = 200;
const TOKEN = "token"; // its name in the storage of this tab

const state = { source: null, offset: 0, rows: [], selected: -1 };

// Rows

function query() {
  const values = { offset: state.offset, limit: PAGE_ROWS };
  for (const id of ["sort", "status", "grade", "text"]) values[id] = byId(id).value;
  return values;
}

async function load() {
  try {
    const page = await state.source.page(query());
    state.rows = page.rows;
    state.selected = -1;
    showSummary(page.summary);
    showRows(page.rows, select);
    showPosition(state.offset, page.rows.length, page.total);
    closeStudy();
    byId("work").hidden = false;
    byId("message").textContent = "";
  } catch (error) {
    showError(error);
  }
}

function loadFrom(offset) {
  state.offset = Math.max(0, offset);
  return load();
}

function select(index) {
  if (index < 0 || index >= state.rows.length) return;
  state.selected = index;
  markSelected(index);
  openStudy(state.rows[index], state.source);
}

function showError(error) {
  if (error.status === 401 || error.status === 403) {
    showLogin(error.message);
  } else {
    byId("message").textContent = error.message;
  }
}

// Login

function showLogin(problem = "") {
  sessionStorage.removeItem(TOKEN);
  byId("login").hidden = false;
  byId("work").hidden = true;
  byId("session").hidden = true;
  byId("login-problem").textContent = problem;
  byId("token").value = "";
  byId("token").focus();
}

async function logIn(token) {
  const source = new Endpoint(token);
  const runs = await source.runs();
  state.source = source;
  sessionStorage.setItem(TOKEN, token);
  byId("login").hidden = true;
  byId("session").hidden = false;
  byId("batch-label").hidden = runs.length === 0;
  if (!runs.length) {
    byId("message").textContent = "No batch is committed yet.";
    return;
  }
  byId("batch").replaceChildren(...runs.map(makeRunOption));
  source.batch = runs[0].batch_id;
  await loadFrom(0);
}

function makeRunOption(run) {
  const name = `${run.run_date}  ${run.series} series  ${run.batch_id.slice(0, 6)}`;
  return make("option", { value: run.batch_id, textContent: name });
}

// Events

function listen() {
  for (const id of ["sort", "status", "grade"]) byId(id).onchange = () => loadFrom(0);
  let timer;
  byId("text").oninput = () => {
    clearTimeout(timer);
    timer = setTimeout(() => loadFrom(0), SEARCH_DELAY_MS);
  };
  byId("filters").onsubmit = (event) => event.preventDefault();
  byId("previous").onclick = () => loadFrom(state.offset - PAGE_ROWS);
  byId("next").onclick = () => loadFrom(state.offset + PAGE_ROWS);
  byId("batch").onchange = () => {
    state.source.batch = byId("batch").value;
    loadFrom(0);
  };
  byId("login").onsubmit = (event) => {
    event.preventDefault();
    logIn(byId("token").value).catch(showError);
  };
  byId("sign-out").onclick = () => showLogin();
  document.onkeydown = onKey;
}

function onKey(event) {
  if (event.key === "Escape") {
    closeStudy();
    event.target.blur?.();
    return;
  }
  if (event.ctrlKey || event.metaKey || event.altKey || isTyping(event)) return;
  const action = actions()[event.key];
  if (!action) return;
  event.preventDefault();
  action();
}

/** Return whether a key belongs to a field; sliders keep their arrows and give up the letters. */
function isTyping(event) {
  if (!/^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName)) return false;
  return event.target.type !== "range" || !/^[jkfo123]$/.test(event.key);
}

function actions() {
  const keys = {
    j: () => select(state.selected + 1),
    k: () => select(state.selected - 1),
    f: pressFull,
    "/": () => byId("text").focus(),
  };
  const viewer = currentViewer();
  if (viewer) {
    keys.ArrowUp = () => viewer.move(1);
    keys.ArrowDown = () => viewer.move(-1);
    keys.o = () => viewer.toggleOverlay();
    for (let index = 0; index < NUM_WINDOWS; index += 1) {
      keys[index + 1] = () => viewer.chooseWindow(index);
    }
  }
  return keys;
}

async function start() {
  listen();
  const embedded = byId("data");
  if (embedded) {
    state.source = new Report(JSON.parse(embedded.textContent));
    await load();
    return;
  }
  const token = sessionStorage.getItem(TOKEN);
  if (token) {
    await logIn(token);
  } else {
    showLogin();
  }
}

start().catch(showError);
