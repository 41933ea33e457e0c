const chosen = new Set();
function show() {
  document.querySelectorAll('[data-name]').forEach(e => e.classList.toggle('on', chosen.has(e.dataset.name)));
  document.querySelector('main').classList.toggle('faded', chosen.size > 0);
}
document.querySelectorAll('nav button').forEach(b => b.addEventListener('click', () => {
  chosen.has(b.dataset.name) ? chosen.delete(b.dataset.name) : chosen.add(b.dataset.name);
  show();
}));
