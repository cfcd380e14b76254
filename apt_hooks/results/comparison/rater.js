"use strict";

const find = (selector) => document.querySelector(selector);
const views = [...document.querySelectorAll("main")];
const data = JSON.parse(find("#data").textContent);
let form; // this rater's items, in order, each with its answers: {choice, time} by criterion
let rater;
let place = { page: 0, question: 0 };
let loaded = false; // the page's pictures are there
let unsaved = false; // there are answers that are in no file yet
let unkept = ""; // why they are not kept in this browser either

function view(id) {
  for (const main of views) main.hidden = main.id !== id;
  fail(id === "start" ? "" : unkept);
}

function fail(message) {
  for (const line of document.querySelectorAll(".failure")) line.textContent = message;
}

// -- what is kept in this browser, and saved as a file -----------------------------------------------------------------

const drawer = () => `apt-hooks ${data.id} ${rater}`;

const isMap = (value) => typeof value === "object" && value !== null && !Array.isArray(value);

/** What is kept, by prior and criterion; null where it is no votes of this page. */
function parsed(text) {
  const criteria = data.questions.map(({ criterion }) => criterion);
  const choices = new Map(form.map(({ prior, candidates }) => [prior, [null, ...candidates]]));
  const isVote = (vote, prior) => isMap(vote) && typeof vote.time === "string" && choices.get(prior)?.includes(vote.choice);
  const areAnswers = ([prior, answers]) =>
    isMap(answers) && Object.entries(answers).every(([name, vote]) => criteria.includes(name) && isVote(vote, prior));
  try {
    const found = JSON.parse(text) ?? {};
    return isMap(found) && Object.entries(found).every(areAnswers) ? found : null;
  } catch {
    return null;
  }
}

/** Of each question the later answer of two. */
function latest(one, other) {
  const both = { ...one, ...other };
  for (const criterion of Object.keys(both)) {
    if (one[criterion]?.time > both[criterion].time) both[criterion] = one[criterion];
  }
  return both;
}

/** Keeps the answers, together with what another tab has kept of this rater; `unkept` tells where that cannot be. */
function keep() {
  unkept = "This browser keeps nothing: save your votes before you close this page.";
  try {
    const before = parsed(localStorage.getItem(drawer()));
    if (!before) {
      unkept =
        "What this browser has kept of this name cannot be read: go on under another (the button with your name), " +
        "or save your votes before you close this page.";
      return;
    }
    for (const item of form) item.answers = latest(before[item.prior] ?? {}, item.answers);
    const answered = form.filter(({ answers }) => Object.keys(answers).length);
    const all = Object.fromEntries(answered.map(({ prior, answers }) => [prior, answers]));
    if (answered.length) localStorage.setItem(drawer(), JSON.stringify(all));
    unkept = "";
  } catch {
    // as `unkept` says
  }
}

const fileName = () => `votes-${rater.replace(/[^\p{L}\p{N}]+/gu, "_")}.jsonl`;

function save() {
  keep();
  const lines = form.flatMap(({ candidates, answers }) =>
    Object.entries(answers).map(([criterion, { choice, time }]) =>
      JSON.stringify({ rater, criterion, shown: candidates, chosen: choice, time }),
    ),
  );
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob(lines.map((line) => `${line}\n`), { type: "application/jsonl" }));
  link.download = fileName();
  link.click();
  unsaved = false;
}

/** The number of this rater's order: a hash of the name. */
function orderOf(name) {
  let hash = 2166136261;
  for (const character of name) hash = Math.imul(hash ^ character.codePointAt(0), 16777619) >>> 0;
  return ((hash ^ (hash >>> 15)) >>> 0) % data.orders.length;
}

// -- where we are -----------------------------------------------------------------------------------------------------

const isAnswered = ({ page, question }) => data.questions[question].criterion in form[page].answers;
const step = ({ page, question }, by) => {
  const index = page * data.questions.length + question + by;
  return { page: Math.floor(index / data.questions.length), question: index % data.questions.length };
};
const isInside = ({ page }) => page >= 0 && page < form.length;

/** The first question without an answer, from here on and then from the beginning; null: all have one. */
function nextOpen() {
  const total = form.length * data.questions.length;
  for (let i = 0; i < total; i++) {
    const index = (place.page * data.questions.length + place.question + i) % total;
    const there = step({ page: 0, question: 0 }, index);
    if (!isAnswered(there)) return there;
  }
  return null;
}

// -- one question -----------------------------------------------------------------------------------------------------

function show(there) {
  const newPage = !isInside(there) || there.page !== place.page || find("#page").hidden;
  place = there;
  view("page");
  if (newPage) {
    showPictures(form[place.page]);
    scrollTo(0, 0);
  }
  const { criterion, text, hint } = data.questions[place.question];
  const count = data.questions.length;
  const answered = form.reduce((sum, item) => sum + Object.keys(item.answers).length, 0);
  find("#page").dataset.criterion = criterion;
  find("#number").textContent = `${place.question + 1}/${count}`;
  find("#text").textContent = text;
  find("#hint").textContent = hint;
  find("#progress").textContent = `page ${place.page + 1} of ${form.length}`;
  find("progress").value = answered / (form.length * count);
  find("#back").disabled = !isInside(step(place, -1));
  find("#forward").disabled = !isAnswered(place);
  showAnswer();
}

function showAnswer() {
  const item = form[place.page];
  const { criterion } = data.questions[place.question];
  const chosen = item.answers[criterion]?.choice; // undefined: none yet
  find("#choices").replaceChildren(
    ...[...item.candidates, null].map((choice, index) => {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = choice === null ? "cannot tell" : `${index + 1}`;
      button.classList.toggle("tie", choice === null);
      button.setAttribute("aria-pressed", `${chosen === choice}`);
      button.disabled = !loaded;
      button.onclick = () => vote(choice);
      return button;
    }),
  );
  [...find("#candidates").children].forEach((figure, index) => {
    figure.classList.toggle("chosen", item.candidates[index] === chosen);
  });
}

async function showPictures(item) {
  loaded = false;
  find("#prompt").textContent = `“${item.prompt}”`;
  find("#candidates").replaceChildren(
    ...item.candidates.map((_, index) => {
      const figure = find("#prior").cloneNode(true);
      figure.removeAttribute("id");
      figure.querySelector("img").alt = `picture ${index + 1}`;
      figure.querySelector("figcaption").textContent = `${index + 1}`;
      return figure;
    }),
  );
  find("#candidates").style.setProperty("--count", item.candidates.length);
  find("#keys").textContent = `keys 1 to ${item.candidates.length}, 0: cannot tell, ←: back; a click enlarges a picture`;
  const images = [...document.querySelectorAll("#page figure img")];
  const sources = [data.photos[item.reference], ...[item.prior, ...item.candidates].map((id) => data.pictures[id])];
  images.forEach((image, index) => {
    image.src = sources[index];
    image.parentElement.onclick = () => enlarge(image);
  });
  try {
    await Promise.all(images.map((image) => image.decode()));
  } catch {
    if (item === form[place.page]) fail("A picture cannot be shown; try another browser.");
    return;
  }
  if (item !== form[place.page]) return; // gone on in the meantime
  loaded = true;
  showAnswer();
}

function vote(choice) {
  if (!loaded) return;
  form[place.page].answers[data.questions[place.question].criterion] = { choice, time: new Date().toISOString() };
  unsaved = true;
  keep();
  goOn();
}

function goOn() {
  const there = nextOpen();
  if (there) show(there);
  else view("end");
}

function enlarge(image) {
  find("#large img").src = image.src;
  find("#large img").alt = image.alt;
  find("#large").showModal();
}

// -- what a rater does ------------------------------------------------------------------------------------------------

function back() {
  if (isInside(step(place, -1))) show(step(place, -1));
}

function forward() {
  if (!isAnswered(place)) return;
  if (isInside(step(place, 1))) show(step(place, 1));
  else goOn();
}

function leave() {
  const where = unkept ? "and this browser does not keep them" : "but this browser keeps them";
  if (unsaved && !confirm(`Your votes are in no file yet, ${where}. Go on to another rater?`)) return;
  unsaved = false;
  location.hash = "";
  find("#name").value = "";
  view("start");
  find("#name").focus();
}

function begin(name) {
  rater = name.trim().replace(/\s+/g, " ");
  if (!rater) return;
  form = data.orders[orderOf(rater)].map(([number, places]) => {
    const { prompt, reference, prior, candidates } = data.items[number];
    const shown = places.map((index) => candidates[index]);
    return { prompt, reference, prior, candidates: shown, answers: {} };
  });
  keep();
  find("#rater").textContent = rater;
  find("#file").textContent = fileName();
  location.hash = encodeURIComponent(rater);
  place = { page: 0, question: 0 };
  goOn();
}

function nameInAddress() {
  try {
    return decodeURIComponent(location.hash.slice(1));
  } catch {
    return ""; // it is no text
  }
}

find("#start form").onsubmit = (event) => {
  event.preventDefault();
  begin(find("#name").value);
};
find("#back").onclick = back;
find("#forward").onclick = forward;
find("#rater").onclick = leave;
find("#another").onclick = leave;
find("#review").onclick = () => show({ page: 0, question: 0 });
for (const button of document.querySelectorAll(".save")) button.onclick = save;
find("#large button").onclick = () => find("#large").close();

document.addEventListener("keydown", (event) => {
  const busy = find("#page").hidden || find("#large").open || event.ctrlKey || event.altKey || event.metaKey;
  if (busy || event.repeat) return; // a key held down is one answer
  const { candidates } = form[place.page];
  if (event.key === "ArrowLeft") back();
  else if (event.key === "ArrowRight") forward();
  else if (event.key === "0") vote(null);
  else if (/^[1-9]$/.test(event.key) && Number(event.key) <= candidates.length) vote(candidates[Number(event.key) - 1]);
});

addEventListener("beforeunload", (event) => {
  if (unsaved) event.preventDefault();
});

// After a reload of the page the rater goes on without the first view.
find("#name").value = nameInAddress();
begin(find("#name").value);
